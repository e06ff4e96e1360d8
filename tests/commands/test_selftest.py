"""`morsr selftest`: passes on what it recorded itself, and says when an output differs."""

from pathlib import Path

import pytest
from PIL import Image

from morsr.cli import main
from morsr.commands import selftest
from morsr.restoring import Restorer


@pytest.fixture
def recorded(restorer, monkeypatch):
    """A small model whose result is the expected one."""
    monkeypatch.setattr(Restorer, "from_pretrained", lambda *arguments, **options: restorer)
    bundled = selftest.assets() / "selftest.png"
    Path("assets").mkdir()
    Path("assets/selftest.png").write_bytes(bundled.read_bytes())
    monkeypatch.setattr(selftest, "assets", lambda: Path("assets"))
    expected = Path("assets/tiny_expected.png")
    assert main(["upscale", "assets/selftest.png", str(expected)]) == 0
    return expected


def test_another_output_is_noticed(recorded, capsys):
    assert Image.open(recorded).size == (384, 256)
    assert main(["selftest"]) == 0
    assert "ok: by 0.000/255" in capsys.readouterr().out
    Image.open(recorded).rotate(180).save(recorded)
    assert main(["selftest"]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    recorded.unlink()
    assert main(["selftest"]) == 2, "nothing is recorded for this model"
