"""Bases from a hub: mirrors that fail, revisions, half precision and shards, on the hub and in a local folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import served

from morsr.errors import WeightsError
from morsr.models.bases import load_base
from morsr.models.loading import find_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Folder of the repositories that a hub serves."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its retries
    with served(tmp_path / "hub", tmp_path / "cache", monkeypatch):
        yield tmp_path / "hub"


def stored_as(folder: Path, **options: Any) -> None:
    """Save the networks and the text encoder of a folder anew."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    half = options.get("variant") == "fp16"
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for part, kind in kinds.items():
        network = kind.from_pretrained(folder / part)
        shutil.rmtree(folder / part)
        (network.half() if half else network).save_pretrained(folder / part, **options)


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".bin"))


def half_a_file(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "fp16"}, {"variant": "fp16", "max_shard_size": "250KB"}],
    ids=["plain", "fp16", "fp16 shards"],
)
def test_every_layout_of_the_weights_loads(options, sd_original, hub):
    folder = shutil.copytree(sd_original, hub / "org" / "sd")
    if options:
        stored_as(folder, **options)
        assert len(list((folder / "unet").iterdir())) > 2 or "max_shard_size" not in options
    expected = load_base(sd_original).state_dict()
    tolerance = 1e-2 if "variant" in options else 0.0
    for source in (folder, "org/sd"):
        for key, value in load_base(source).state_dict().items():
            torch.testing.assert_close(value, expected[key], atol=tolerance, rtol=tolerance, msg=key)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: [shutil.rmtree(one) for one in folder.iterdir() if one.is_dir()], "scheduler_config.json: no"),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae/config.json: no such file"),
        (only_pickles, r"pickles, which are never loaded; save them .*save_pretrained.*org/name@rev"),
        (half_a_file, "cut short"),
    ],
    ids=["empty", "half", "pickles", "half a file"],
)
@pytest.mark.parametrize("local", [True, False])
def test_the_next_mirror_is_tried_where_one_cannot_be_used(
    spoil, told, local, sd_original, hub,
    capsys,
):  # fmt: skip
    bad = shutil.copytree(sd_original, hub / "bad" / "sd")
    spoil(bad)
    (bad / "README.md").touch()
    name = str(bad) if local else "bad/sd"
    assert load_base([name, str(sd_original)]).base_id == sd_original.name
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("morsr: no base model from")]
    assert name in line
    with pytest.raises(WeightsError, match=told) as refused:
        load_base(name)
    assert name in str(refused.value)
    assert "snapshots" not in str(refused.value), "the repository is named, not a folder of the cache"


@pytest.mark.parametrize("name", ["none/sd", "gated/sd", "broken/sd", "cut/sd", "good/sd@gone"])
def test_a_mirror_that_answers_badly_is_one_line(name, sd_original, hub, capsys):
    for organisation in ("cut", "good"):
        shutil.copytree(sd_original, hub / organisation / "sd")
    assert load_base([name, str(sd_original)]).base_id == sd_original.name
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("morsr: no base model from")]
    assert name in line
    with pytest.raises(WeightsError) as refused:
        load_base([name, "none/other"])
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)
    assert "none/other" in str(refused.value)
    if name not in ("broken/sd", "cut/sd"):
        assert "with the remedy at its end" in str(refused.value), "what the hub says is not cut"


def test_a_revision_is_asked_for(sd_original, tmp_path, monkeypatch):
    shutil.copytree(sd_original, tmp_path / "hub" / "org" / "sd")
    (tmp_path / "hub" / "org" / "v1.5").mkdir()
    (tmp_path / "hub" / "org" / "v1.5" / "config.json").write_text("{}")
    with served(tmp_path / "hub", tmp_path / "cache", monkeypatch) as asked:
        for revision in ("v1", "refs/pr/1"):
            assert load_base(f"org/sd@{revision}").base_id == f"org/sd@{revision}"
            assert any(path.endswith(f"revision/{revision}") for path in asked), asked
            asked.clear()
        assert find_model("org/v1.5@v1").is_dir()
        assert any(path.endswith("revision/v1") for path in asked), asked


def test_a_folder_without_adapters_does_not_hide_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert find_model("tiny").parts[-2:] == ("tiny", "adapters.safetensors")
    Path("tiny/adapters.safetensors").touch()
    assert find_model("tiny") == Path("tiny")
