"""The report and its command, on a small random model from the classes that the real ones use."""

import base64
import os
import re
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from morsr.adapters import MoRConfig, adapter_parameters
from morsr.cli import main
from morsr.errors import ConfigError
from morsr.estimators import build_estimator
from morsr.evaluation.report import examine, write_report
from morsr.evaluation.routing import RoutingTable
from morsr.models.bases import load_base
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.restoring.restorer import Restorer

SETTINGS = MoRConfig(num_ranks=12, num_shared=2, top_k=3, num_zero=2, targets=(r"unet\..*(to_q|to_v|conv1|conv2)",))


def made(base: Path, settings: MoRConfig) -> OneStepGenerator:
    torch.manual_seed(0)
    generator = OneStepGenerator(
        load_base(base), build_estimator("frequency"), adapters=settings,
        one_step=OneStepConfig(timestep=1, parametrization="residual"),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in adapter_parameters(generator.base):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return generator


@pytest.fixture(scope="module")
def generator(small_base):
    return made(small_base, SETTINGS)


@pytest.fixture
def loads(monkeypatch):
    """Let `morsr routing` load a generator."""

    def give(generator: OneStepGenerator) -> None:
        restorer = Restorer(generator, device="cpu", dtype="float32")
        monkeypatch.setattr(Restorer, "from_pretrained", lambda *_, **__: restorer)

    return give


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(9):
        noise = torch.rand(3, 64, 64) * (index / 8) + 0.5 * (1 - index / 8)
        Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"photo{index}.png")
    return folder


def test_a_table_runs_estimator_and_router_only(generator, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a UNet or autoencoder ran")

    images = torch.rand(5, 3, 24, 24)
    expected = generator(images).routing
    before = generator.adapters.routing
    for name in ("forward", "encode", "decode", "predict"):
        monkeypatch.setattr(generator.base, name, refuse)
    table = RoutingTable.from_images(generator, images)
    torch.testing.assert_close(table.chosen.transpose(0, 1), expected.chosen)
    torch.testing.assert_close(table.gates.transpose(0, 1), expected.selected)
    assert generator.adapters.routing is before, "the model's own routing is left alone"
    assert table.update.shape == (5, len(generator.adapters.layer_names))


def test_one_image_in_depth(generator):
    lr = torch.rand(1, 3, 20, 26)
    found = examine(generator, lr, name="x", max_side=24)
    assert found.restored.shape == (3, 80, 96)
    assert (found.restored - found.shared).abs().max() > 0
    generator.adapters.strength = 0.0
    try:
        shared = generator(lr[..., 1:25], score_lr=lr).sr[0].clamp(0, 1)
    finally:
        generator.adapters.strength = 1.0
    torch.testing.assert_close(found.shared, shared)


def test_a_model_of_another_scale_is_shown_at_its_scale(generator, monkeypatch, tmp_path):
    monkeypatch.setattr(generator, "one_step", replace(generator.one_step, scale=2))
    found = examine(generator, torch.rand(1, 3, 20, 24))
    assert found.restored.shape == (3, 40, 48)
    write_report(found.routing, tmp_path / "page.html", examples=[replace(found, shared=found.restored + 0.1)])
    page = (tmp_path / "page.html").read_text()
    assert "the difference, 5 times" in page  # 0.5 + 5 × 0.1 is white
    data = re.findall(r'base64,([^"]+)" alt=""><figcaption>the difference', page)[0]
    assert np.asarray(Image.open(BytesIO(base64.b64decode(data)))).min() == 255


def test_the_page_of_a_folder(loads, generator, photos):
    loads(generator)
    words = f"routing {photos} --out report.html --degrade realesrgan --table table.safetensors"
    assert main(words.split()) == 0
    page = Path("report.html").read_text()
    assert len(page) < 5_000_000
    assert not re.search(r"<script|http|\{\{", page)
    for word in (
        "Load of every slot",
        "gate mass",
        "effective experts",
        "routed update",
        "Light image: photo",
        "Medium image: photo",
        "Severe image: photo",
        "What the kinds look like",
    ):
        assert word in page
    table = RoutingTable.load("table.safetensors")
    assert {"blur", "noise", "jpeg"} <= set(table.truth)
    assert main(["routing", "table.safetensors", "--out", "again.html"]) == 0
    assert "no image was restored" in Path("again.html").read_text()


def test_unreadable_files_and_odd_names(loads, generator, photos, capsys):
    loads(generator)
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "sub").mkdir()
    (photos / "photo1.png").rename(photos / "sub" / "photo0.png")
    odd = os.fsdecode(b"caf\xe9") if sys.platform == "linux" else "odd"
    (photos / "photo2.png").rename(photos / f"{odd}.png")
    words = ["routing", str(photos), "--out", "report.html", "--table", "t.safetensors"]
    assert main(words) == 1
    page = Path("report.html").read_text()
    assert "1 of 10 images" in page
    assert "broken.png" in capsys.readouterr().err
    names = RoutingTable.load("t.safetensors").names
    assert {"photo0_png", "sub/photo0_png"} <= set(names)
    assert len(set(names)) == 9
    assert all(name.isprintable() for name in names)


def test_a_model_without_routing_is_refused(loads, small_base, photos, capsys):
    plain = made(small_base, MoRConfig.lora(4, targets=("to_q",)))
    with pytest.raises(ConfigError):
        examine(plain, torch.rand(1, 3, 16, 16))
    loads(plain)
    assert main(["routing", str(photos), "--out", "lora.html"]) == 2
    assert "no routing" in capsys.readouterr().err
    assert not Path("lora.html").exists()
