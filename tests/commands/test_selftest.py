"""`morsr selftest`: passes on what it recorded itself, and says when an output differs."""

from pathlib import Path

from PIL import Image

from morsr.cli import main
from morsr.commands import selftest
from morsr.restoring import Restorer


def test_another_output_is_noticed(restorer, monkeypatch, capsys):
    monkeypatch.setattr(Restorer, "from_pretrained", lambda *arguments, **options: restorer)
    bundled = selftest.assets() / "selftest.png"
    Path("assets").mkdir()
    Path("assets/selftest.png").write_bytes(bundled.read_bytes())
    monkeypatch.setattr(selftest, "assets", lambda: Path("assets"))
    recorded = Path("assets/tiny_expected.png")  # by a small model in place of the shipped one
    assert main(["upscale", "assets/selftest.png", str(recorded)]) == 0
    assert Image.open(recorded).size == (384, 256)
    assert main(["selftest"]) == 0
    assert "ok: by 0.000/255" in capsys.readouterr().out
    Image.open(recorded).rotate(180).save(recorded)
    assert main(["selftest"]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    recorded.unlink()
    assert main(["selftest"]) == 2, "nothing is recorded for this model"
