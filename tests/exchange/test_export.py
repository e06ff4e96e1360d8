"""One fixed routing leaves as a LoRA, as a diffusers folder and as ONNX, and gives the same image there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from morsr.adapters import plain_state_dict
from morsr.cli import main
from morsr.errors import ConfigError, InputError, MissingDependencyError
from morsr.models import export
from morsr.models.backbone import load_backbone
from morsr.models.generator import OneStepGenerator
from morsr.models.loading import load_generator
from morsr.restoring import Restorer


def restored(model: OneStepGenerator | Path, lr: Tensor, **settings: float) -> Tensor:
    generator = load_generator(model) if isinstance(model, Path) else model
    return Restorer(generator, device="cpu")(lr, color="none", tile=None, **settings)


@pytest.fixture
def photo(tmp_path: Path, lr: Tensor) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray((lr[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
    return path


def read(photo: Path) -> Tensor:
    return torch.tensor(np.asarray(Image.open(photo))).permute(2, 0, 1)[None] / 255


def test_diffusers_folder_gives_the_same_image(adapters_file: Path, photo: Path, repo_root: Path) -> None:
    """With nothing of ours: the lines of docs/exchange.md are run as they stand there."""
    settings = ["--model", str(adapters_file), "--image", str(photo), "--strength", "1.5"]
    assert main(["export", "diffusers", "merged", *settings]) == 0
    image = read(photo)
    torch.testing.assert_close(
        restored(Path("merged"), image), restored(adapters_file, image, strength=1.5), atol=1e-5, rtol=0
    )
    Image.open(photo).resize((14, 10)).save(photo)  # sides that fit the grid need no padding
    assert main(["export", "diffusers", "merged", *settings]) == 0
    image = read(photo)
    expected = restored(adapters_file, image, strength=1.5)
    assert (expected - restored(adapters_file, image, strength=0.0)).abs().max() > 0.01

    Path("merged").rename("OUT")
    page = (repo_root / "docs" / "exchange.md").read_text(encoding="utf-8")
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AutoencoderTiny" in part)
    names = {"image": image}
    exec(block.replace("lr = torch.rand(1, 3, 32, 32)", "lr = image"), names)
    torch.testing.assert_close(names["sr"], expected, atol=1e-5, rtol=0)


def test_a_decoder_of_its_own_goes_along(adapters_file: Path, own_decoder: Path, photo: Path) -> None:
    settings = ["--model", str(adapters_file), "--decoder", str(own_decoder), "--image", str(photo)]
    assert main(["export", "diffusers", "merged", *settings]) == 0
    image = read(photo)
    expected = restored(load_generator(adapters_file, decoder=own_decoder), image)
    torch.testing.assert_close(restored(Path("merged"), image), expected, atol=1e-5, rtol=0)
    assert (expected - restored(adapters_file, image)).abs().max() > 0.01


def test_export_leaves_the_model_as_it_was(generator: OneStepGenerator, small_base: Path, lr: Tensor) -> None:
    export.fix_routing(generator, image=lr)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    export.export_diffusers("merged", generator)
    torch.testing.assert_close(generator.state_dict(), before, atol=0, rtol=0)
    merged = plain_state_dict(load_backbone("merged"))
    bare = plain_state_dict(load_backbone(small_base))
    changed = {key for key, value in merged.items() if not torch.equal(value, bare[key])}
    assert generator.adapters is not None
    assert changed == {f"{name}.weight" for name in generator.adapters.layer_names}


def test_lora_folders_give_the_same_image_by_peft(adapters_file: Path, photo: Path, small_base: Path) -> None:
    from peft import PeftModel

    assert main(["export", "lora", "lora", "--model", str(adapters_file), "--image", str(photo)]) == 0
    base = load_backbone(small_base)
    base.unet = PeftModel.from_pretrained(base.unet, "lora/unet").base_model.model
    base.vae = PeftModel.from_pretrained(base.vae, "lora/vae").base_model.model
    image = read(photo)
    one_step = load_generator(adapters_file).one_step
    got = restored(OneStepGenerator(base, one_step=one_step), image)
    torch.testing.assert_close(got, restored(adapters_file, image), atol=1e-5, rtol=0)
    assert (got - restored(OneStepGenerator(load_backbone(small_base), one_step=one_step), image)).abs().max() > 0.01


def test_a_lora_that_needs_a_decoder_of_its_own_brings_it(
    adapters_file: Path, own_decoder: Path, photo: Path, small_base: Path
) -> None:
    from peft import PeftModel

    settings = ["--model", str(adapters_file), "--decoder", str(own_decoder), "--image", str(photo)]
    assert main(["export", "lora", "lora", *settings]) == 0
    base = load_backbone(small_base, decoder="lora/decoder")
    base.unet = PeftModel.from_pretrained(base.unet, "lora/unet").base_model.model
    base.vae = PeftModel.from_pretrained(base.vae, "lora/vae").base_model.model
    image, expected = read(photo), load_generator(adapters_file, decoder=own_decoder)
    got = restored(OneStepGenerator(base, one_step=expected.one_step), image)
    torch.testing.assert_close(got, restored(expected, image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["lora", "diffusers"])
def test_files_are_as_readable_as_any_other(form: str, adapters_file: Path, photo: Path) -> None:
    before = os.umask(0o027)
    try:
        assert main(["export", form, "out", "--model", str(adapters_file), "--image", str(photo)]) == 0
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in Path("out").rglob("*") if path.is_file()}
    assert len(modes) >= 2
    assert set(modes.values()) == {"0o640"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_onnx_gives_the_same_image_at_any_size(
    adapters_file: Path, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", "onnx", "model.onnx", "--model", str(adapters_file), "--image", str(photo)]) == 0
    Path("file").write_text("new")
    assert Path("model.onnx").stat().st_mode == Path("file").stat().st_mode
    assert not list(Path().glob(".morsr-*"))
    assert "differs from the model by at most" in capsys.readouterr().err
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map["morsr"])
    assert (described["scale"], described["color"], described["strength"]) == (4, "none", 1.0)
    assert main(["export", "diffusers", "merged", "--model", str(adapters_file), "--image", str(photo)]) == 0
    for height, width in ((9, 13), (16, 16), (1, 1), (5, 40)):
        image = torch.rand(1, 3, height, width)
        (sr,) = session.run(None, {"lr": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(sr), restored(Path("merged"), image), atol=1e-5, rtol=0)
    got = torch.from_numpy(session.run(None, {"lr": read(photo).numpy()})[0])
    torch.testing.assert_close(got, restored(adapters_file, read(photo)), atol=1e-5, rtol=0)


def test_scores_instead_of_an_image(generator: OneStepGenerator, lr: Tensor) -> None:
    found = export.fix_routing(generator, image=lr)
    assert list(found) == list(generator.adapters.score_names)
    by_image = generator.adapters.routing
    export.fix_routing(generator, scores=list(found.values()))
    torch.testing.assert_close(generator.adapters.routing.gates, by_image.gates, atol=1e-6, rtol=0)


def test_what_cannot_be_exported(
    generator: OneStepGenerator, small_base: Path, lr: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="either an image or the 11 scores band_low"):
        export.fix_routing(generator)
    with pytest.raises(ConfigError, match="either an image"):
        export.fix_routing(generator, image=lr, scores=[0.5] * 11)
    with pytest.raises(ConfigError, match="expected 11 numbers"):
        export.fix_routing(generator, scores=[0.5] * 10)
    with pytest.raises(ConfigError, match=r"in \[0, 1\]"):
        export.fix_routing(generator, scores=[1.5] + [0.5] * 10)
    with pytest.raises(InputError, match="no routing"):
        export.export_lora(tmp_path / "lora", generator)
    with pytest.raises(InputError, match="no routing"):
        export.export_diffusers(tmp_path / "merged", generator)
    export.fix_routing(generator, image=lr)
    generator.adapters.saved = ("unet.conv_in",)
    with pytest.raises(ConfigError, match=r"unet\.conv_in were trained whole"):
        export.export_lora(tmp_path / "lora", generator)
    bare = OneStepGenerator(load_backbone(small_base))
    with pytest.raises(ConfigError, match="no adapters"):
        export.export_lora(tmp_path / "lora", bare)
    with pytest.raises(ConfigError, match="routes nothing"):
        export.fix_routing(bare, image=lr)
    assert export.fix_routing(bare) == {}
    with pytest.raises(ConfigError, match="whole number from 1 to 8"):
        export.export_onnx(tmp_path / "m.onnx", generator, scale=9)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"morsr\[onnx\]"):
        export.export_onnx(tmp_path / "m.onnx", generator)


def test_the_command_refuses_in_one_line(adapters_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "lora", "lora", "--model", str(adapters_file), "--scores", "0.1;0.2"]) == 2
    assert capsys.readouterr().err.startswith("morsr: --scores: expected numbers with commas")
    Path("file").write_text("mine")
    for form in ("lora", "diffusers"):
        assert main(["export", form, "file", "--model", str(adapters_file), "--scores", "0.1"]) == 2
        assert capsys.readouterr().err == "morsr: file: expected a folder to export into, this is a file\n"
    assert main(["import", "osediff", "x.pkl", "x.bin"]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
