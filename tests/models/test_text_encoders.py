"""Prompts of every family through its own text encoders: small ones of the real classes, saved by diffusers."""

import inspect
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hub_server import served
from twins import FAMILIES, write_twin

from morsr.models.bases import load_base
from morsr.models.bases.reading import POSITIVE_PROMPT

_LETTERS = [chr(code) for code in range(33, 127)]
_WIDTHS = {
    "sdxl": {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 32},
    "sd3": {"joint_attention_dim": 24, "pooled_projection_dim": 16},
    "flux1": {"joint_attention_dim": 24, "pooled_projection_dim": 8},
    "flux2-klein": {"joint_attention_dim": 24},
    "z-image": {"axes_lens": [512, 16, 16]},
    "sana": {},
}
"""Settings of the networks that the text encoders below fit."""


def clip(kind: str) -> tuple[Any, Any]:
    """A CLIP of width 8, with or without its projection."""
    import transformers

    words = [*_LETTERS, *(f"{one}</w>" for one in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=77
    )
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=8, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    )  # fmt: skip
    return getattr(transformers, kind)(config), tokenizer


def t5() -> tuple[Any, Any]:
    """A T5 of width 24."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((one, -2.0) for one in ("\u2581", *_LETTERS))]
    config = T5Config(vocab_size=len(vocabulary), d_model=24, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    return T5EncoderModel(config), T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def qwen(kind: str, layers: int) -> tuple[Any, Any]:
    """A Qwen3 of width 8."""
    import transformers

    vocabulary = {word: place for place, word in enumerate([*_LETTERS, "\u0120", "\u010a", "<|endoftext|>"])}
    tokenizer = transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=[])
    tokenizer.chat_template = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, initializer_range=0.5,
    )  # fmt: skip
    return getattr(transformers, kind)(config), tokenizer


def gemma() -> tuple[Any, Any]:
    """A Gemma 2 of width 8."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *_LETTERS]
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    return Gemma2Model(config), GemmaTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=[])


ENCODERS: dict[str, list[Callable[[], tuple[Any, Any]]]] = {
    "sdxl": [lambda: clip("CLIPTextModel"), lambda: clip("CLIPTextModelWithProjection")],
    "sd3": [lambda: clip("CLIPTextModelWithProjection"), lambda: clip("CLIPTextModelWithProjection"), t5],
    "flux1": [lambda: clip("CLIPTextModel"), t5],
    "flux2-klein": [lambda: qwen("Qwen3ForCausalLM", 28)],
    "z-image": [lambda: qwen("Qwen3Model", 2)],
    "sana": [gemma],
}


@pytest.fixture(scope="module", params=ENCODERS)
def told(request, tmp_path_factory):
    """A family, its folder with text encoders and no embeddings, and diffusers' pipeline that was saved there."""
    import diffusers

    name = request.param
    folder = write_twin(tmp_path_factory.mktemp("text") / name, name, **_WIDTHS[name])
    base, kind = load_base(folder, prompts=_any_prompts(name)), getattr(diffusers, FAMILIES[name].pipeline)
    parts: dict[str, Any] = {"vae": base.vae, base.network_name: base.denoiser, "scheduler": scheduler(name)}
    for place, make in enumerate(ENCODERS[name], start=1):
        end = "" if place == 1 else f"_{place}"
        encoder, parts[f"tokenizer{end}"] = make()
        parts[f"text_encoder{end}"] = encoder.eval()
    wanted = inspect.signature(kind).parameters
    made = kind(**parts, **({"is_distilled": True} if "is_distilled" in wanted else {}))
    shutil.rmtree(folder)
    made.save_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return name, folder, made


def _any_prompts(name: str) -> dict[str, torch.Tensor]:
    settings = {**FAMILIES[name].settings, **_WIDTHS[name]}
    keys = ("joint_attention_dim", "cap_feat_dim", "caption_channels", "cross_attention_dim")
    width = next(settings[key] for key in keys if key in settings)
    return {side: torch.zeros(1, 1, width) for side in ("clean", "degraded")} | {
        f"{side}_pooled": torch.zeros(1, 8) for side in ("clean", "degraded")
    }


def scheduler(name: str) -> Any:
    """One whose single step starts at the last timestep."""
    import diffusers

    kind, settings = FAMILIES["sd3" if name == "sana" else name].scheduler
    if name == "sdxl":
        kind, settings = "DDIMScheduler", {**settings, "timestep_spacing": "trailing", "clip_sample": False}
    return getattr(diffusers, kind)(**settings)


def test_a_text_steers_the_step_as_in_the_familys_pipeline(told):
    name, folder, made = told
    base = load_base(folder).eval()
    z = torch.randn(1, base.in_channels, 16, 16)
    options: dict[str, Any] = {"latents": z, "guidance_scale": 0.0 if name == "z-image" else 1.0}
    if name == "flux1":
        options |= {"latents": made._pack_latents(z, *z.shape), "guidance_scale": 3.5}
    elif name == "sana":
        options |= {"use_resolution_binning": False, "complex_human_instruction": None}
    side = z.shape[-1] * base.latent_factor
    options |= {"num_inference_steps": 1, "height": side, "width": side, "output_type": "pt"}
    shown = made(prompt=POSITIVE_PROMPT, **options).images
    with torch.no_grad():
        ours = (base.decode(base.clean(z, 999)) / 2 + 0.5).clamp(0, 1)
        other = (base.decode(base.clean(z, 999, base.condition("degraded"))) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, shown, atol=5e-4, rtol=0)
    assert (other - shown).abs().max() > 1e-3


def test_embeddings_are_cached_and_then_no_encoder_is_needed(told, tmp_path):
    _, folder, _ = told
    base = load_base(folder)
    base.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("text_encoder*"))
    torch.testing.assert_close(load_base(tmp_path / "saved").prompts, base.prompts, atol=0, rtol=0)


def test_the_encoders_come_from_the_hub_too(told, tmp_path, monkeypatch):
    name, folder, _ = told
    shutil.copytree(folder, tmp_path / "hub" / "org" / name)
    with served(tmp_path / "hub", tmp_path / "cache", monkeypatch):
        found = load_base(f"org/{name}").prompts
    torch.testing.assert_close(found, load_base(folder).prompts, atol=0, rtol=0)
