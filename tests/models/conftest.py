"""A stand-in for Stable Diffusion 2.1-base: small networks with random weights, in the files that the real one has."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from morsr.models.bases.loading import ARCHITECTURES


def write_text_encoder(folder: Path) -> None:
    """text_encoder/ by transformers, tokenizer/ as the plain files that Stable Diffusion 2 has."""
    from transformers import CLIPTextConfig, CLIPTextModel

    letters = [chr(code) for code in range(33, 127)]
    words = ["!", *(one for one in letters if one != "!")]
    vocabulary = [*words, *(f"{one}</w>" for one in letters), "ph", "photo</w>", "<|startoftext|>", "<|endoftext|>"]
    ids = {token: place for place, token in enumerate(vocabulary)}
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps(ids))
    (tokenizer / "merges.txt").write_text("#version: 0.2\np h\n")
    special = {name: {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
               for name, token in (("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>"),
                                   ("unk_token", "<|endoftext|>"))}  # fmt: skip
    # Stable Diffusion 2 pads with "!", and only this file says so.
    (tokenizer / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "!"}))
    settings = {"do_lower_case": True, "model_max_length": 7, "tokenizer_class": "CLIPTokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**special, **settings, "pad_token": "<|endoftext|>"}))
    config = CLIPTextConfig(
        vocab_size=len(ids), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=7, eos_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|startoftext|>"],
        hidden_act="gelu",
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


@pytest.fixture(scope="session")
def sd_original(tmp_path_factory):
    """The stand-in's folder, not to be written to; `sd_folder` is a copy."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd") / "stable-diffusion-2-1-base"
    _, shapes = ARCHITECTURES["small"]
    UNet2DConditionModel(**shapes.network).save_pretrained(folder / "unet")
    AutoencoderKL(**shapes.vae).save_pretrained(folder / "vae")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon",
        skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    write_text_encoder(folder)
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None],
        "feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    return folder


@pytest.fixture
def sd_folder(sd_original, tmp_path):
    """A copy of the stand-in that a test may damage."""
    return Path(shutil.copytree(sd_original, tmp_path / "sd"))
