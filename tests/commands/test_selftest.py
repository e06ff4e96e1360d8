"""`morsr selftest`: passes on what it recorded itself, and names what was changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from morsr.cli import main
from morsr.commands import selftest
from morsr.restoring import Restorer


@pytest.fixture
def recorded(restorer: Restorer, monkeypatch: pytest.MonkeyPatch) -> Restorer:
    """A small model whose result stands as the expected one."""
    monkeypatch.setattr(Restorer, "from_pretrained", lambda *arguments, **options: restorer)
    bundled = selftest.assets() / "selftest.png"
    Path("assets").mkdir()
    Path("assets/selftest.png").write_bytes(bundled.read_bytes())
    monkeypatch.setattr(selftest, "assets", lambda: Path("assets"))
    assert main(["selftest", "--record", "assets"]) == 0
    return restorer


def test_the_bundled_image_is_small_and_of_size_96_by_64():
    path = selftest.assets() / "selftest.png"
    assert Image.open(path).size == (96, 64)
    assert path.stat().st_size < 30_000


def test_it_passes_on_its_own_record(recorded: Restorer, capsys: pytest.CaptureFixture[str]):
    assert main(["selftest", "--save", "look.png"]) == 0
    told = capsys.readouterr().out
    assert "DIFFER" not in told
    for name in ("weights", "scores", "routing", "output", "repeat", "tiles", "kind RGBA"):
        assert f"ok      {name}" in told
    assert Image.open("look.png").size == (384, 256)


def test_changed_weights_are_named(recorded: Restorer, capsys: pytest.CaptureFixture[str]):
    with torch.no_grad():
        recorded.generator.base.vae.decoder.layers[0].weight.mul_(1.5)
    assert main(["selftest"]) == 1
    told = capsys.readouterr().out
    assert "DIFFER  weights" in told
    assert "ok      routing" in told
    assert "the first in the flow is: weights" in told


def test_a_changed_expectation_is_named(recorded: Restorer, capsys: pytest.CaptureFixture[str]):
    path = Path("assets/tiny_expected.json")
    expected = json.loads(path.read_text())
    expected["scores"]["mean"] += 0.1
    path.write_text(json.dumps(expected))
    image = Image.open("assets/tiny_expected.png").convert("RGB")
    image.rotate(180).save("assets/tiny_expected.png")
    assert main(["selftest"]) == 1
    told = capsys.readouterr().out
    assert "DIFFER  scores" in told
    assert "DIFFER  output" in told
    assert "ok      weights" in told


def test_without_a_record_only_the_rest_is_checked(recorded: Restorer, capsys: pytest.CaptureFixture[str]):
    Path("assets/tiny_expected.json").unlink()
    assert main(["selftest"]) == 0
    told = capsys.readouterr().out
    assert "no expected output is shipped for tiny" in told
    assert "ok      repeat" in told
