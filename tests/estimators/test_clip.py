"""The CLIP estimator against transformers' own logits, on a small model saved in the real format."""

import json
import shutil

import pytest
import torch
from twins import on_base, save

from morsr.errors import ConfigError, WeightsError
from morsr.estimators import build_estimator
from morsr.estimators.clip import load_prompts

transformers = pytest.importorskip("transformers")

SIZE = 32


def _save_clip(folder, seed=0):
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary, size = {word: place for place, word in enumerate(words)}, len(words)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    torch.manual_seed(seed)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **common, "vocab_size": size, "eos_token_id": size - 1, "bos_token_id": size - 2, "pad_token_id": size - 1,
        },
        vision_config={**common, "image_size": SIZE, "patch_size": 8},
        projection_dim=24,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # default weights are so small that all embeddings coincide
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return _save_clip(tmp_path_factory.mktemp("clip"))


def _reference_scores(folder, images, prompts, temperature=None):
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    estimator = build_estimator("clip", model=folder)
    pixels = (images - estimator.pixel_mean) / estimator.pixel_std
    scores = []
    for (positive,), (negative,) in prompts.values():
        tokens = tokenizer([positive, negative], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(pixel_values=pixels, **tokens).logits_per_image
        if temperature is not None:
            logits = logits / model.logit_scale.exp() * temperature
        scores.append(logits.softmax(dim=1)[:, 1])
    return torch.stack(scores, dim=1).detach()


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_scores_are_the_softmax_of_the_models_own_logits(clip_folder, temperature):
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    estimator = build_estimator("clip", model=clip_folder, temperature=temperature)
    result = estimator(images)
    expected = _reference_scores(clip_folder, images, load_prompts("pairs"), temperature)
    torch.testing.assert_close(result.scores, expected, atol=2e-5, rtol=1e-4)
    assert estimator.dim == 7
    assert result.names[1] == "blur"
    kinds = expected[:, [result.names.index(name) for name in ("blur", "noise", "compression")]]
    torch.testing.assert_close(result.severity, 1 - (1 - kinds).prod(dim=1), atol=2e-5, rtol=1e-4)


def test_a_file_stores_a_hub_id_and_the_weights_digest(clip_folder, tmp_path):
    estimator = build_estimator("clip", model=clip_folder, temperature=50.0, worst=True)
    spec = json.loads(json.dumps(estimator.spec))
    assert spec["args"]["model"] == clip_folder.name  # a folder that names no hub id
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    again = build_estimator(spec, model=clip_folder)
    torch.testing.assert_close(again(images).scores, estimator(images).scores)
    assert again.spec == estimator.spec

    config = json.loads((clip_folder / "config.json").read_text())
    named = shutil.copytree(clip_folder, tmp_path / "named")
    (named / "config.json").write_text(json.dumps({**config, "_name_or_path": "openai/clip-vit-base-patch32"}))
    assert build_estimator("clip", model=named).spec["args"]["model"] == "openai/clip-vit-base-patch32"


def test_adapters_move_to_a_machine_whose_clip_lies_elsewhere(clip_folder, small_base, tmp_path):
    from morsr.adapters import read_adapters_header
    from morsr.models.loading import load_generator
    from morsr.training.adapter_state import runs_otherwise

    here = shutil.copytree(clip_folder, tmp_path / "here")
    made = on_base(small_base, build_estimator("clip", model=here))
    file = save(tmp_path / "adapters.safetensors", made)
    extra = read_adapters_header(file)["extra"]
    assert str(tmp_path) not in str(extra["estimator"])
    there = here.rename(tmp_path / "there")
    with pytest.raises(WeightsError, match=r"--estimator FOLDER_OR_ID"):
        load_generator(file)
    images = torch.rand(1, 3, SIZE, SIZE)
    moved = load_generator(file, estimator=str(there))
    torch.testing.assert_close(moved.estimator(images).scores, made.estimator(images).scores)
    assert not runs_otherwise(extra, moved)
    other = _save_clip(tmp_path / "other", seed=1)
    with pytest.raises(WeightsError, match="other weights"):
        load_generator(file, estimator=str(other))
    moved.estimator = build_estimator("clip", model=other)
    assert "digest" in runs_otherwise(extra, moved)


def test_half_precision_weights_of_a_folder(clip_folder, tmp_path):
    folder, images = shutil.copytree(clip_folder, tmp_path / "clip"), torch.rand(1, 3, SIZE, SIZE)
    (folder / "model.safetensors").unlink()
    transformers.CLIPModel.from_pretrained(clip_folder).half().save_pretrained(folder, variant="fp16")
    whole, half = (build_estimator("clip", model=one) for one in (clip_folder, folder))
    assert half.spec["args"]["digest"] == whole.spec["args"]["digest"]
    torch.testing.assert_close(half(images).scores, whole(images).scores, atol=0.02, rtol=0.02)


def test_a_pickle_is_never_read(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    torch.save(transformers.CLIPModel.from_pretrained(clip_folder).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        build_estimator("clip", model=folder)


def test_ensembles_and_own_prompts(clip_folder, tmp_path):
    images = torch.rand(2, 3, SIZE, SIZE)
    ensemble = build_estimator("clip", model=clip_folder, prompts="ensemble")(images)
    assert ensemble.names == tuple(load_prompts("pairs"))
    own = tmp_path / "own.yaml"
    own.write_text("dimensions:\n  rain: {positive: dry photo, negative: [wet photo, wet photo]}\n")
    estimator = build_estimator("clip", model=clip_folder, prompts=own)
    assert estimator(images).names == ("rain",)
    own.unlink()  # a file of adapters carries the texts themselves
    again = build_estimator(estimator.spec, model=clip_folder)
    torch.testing.assert_close(again(images).scores, estimator(images).scores)


@pytest.mark.parametrize(
    "text",
    [
        "dimensions: {}",
        "dimensions: {a: {positive: x}}",
        "dimensions: {a: {positive: x, negative: []}}",
        "dimensions: {a: {positive: x, negative: y, neutral: z}}",
        "dimensions: {a: {positive: x, negative: y}}\ntemplates: [no place]",
        "dimensions: {a: {positive: x, negative: y}}\nextra: 1",
        "dimensions: [",
        "",
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, text):
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(ConfigError, match="prompts"):
        build_estimator("clip", prompts=tmp_path / "prompts.yaml")


def test_missing_weights_say_what_would_do(tmp_path):
    with pytest.raises(WeightsError, match=r"clip-vit-base-patch32.*frequency"):
        build_estimator("clip", model=tmp_path)
    with pytest.raises(ConfigError, match="temperature"):
        build_estimator("clip", model=tmp_path, temperature=-1.0)
