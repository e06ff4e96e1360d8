"""`morsr selftest`: passes on what it recorded itself, and names what was changed."""

import json
from pathlib import Path

import pytest
from PIL import Image

from morsr.cli import main
from morsr.commands import selftest
from morsr.restoring import Restorer


@pytest.fixture
def recorded(restorer, monkeypatch):
    """A small model whose result stands as the expected one."""
    monkeypatch.setattr(Restorer, "from_pretrained", lambda *arguments, **options: restorer)
    bundled = selftest.assets() / "selftest.png"
    Path("assets").mkdir()
    Path("assets/selftest.png").write_bytes(bundled.read_bytes())
    monkeypatch.setattr(selftest, "assets", lambda: Path("assets"))
    assert main(["selftest", "--record", "assets"]) == 0
    assert Image.open("assets/tiny_expected.png").size == (384, 256)
    return restorer


def checks(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, str]:
    """What was compared, and whether it differs."""
    capsys.readouterr()
    assert main(["selftest"]) == code
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[1]: line[0] for line in lines if line[0] in ("ok", "DIFFER")}


def test_what_was_changed_is_named(recorded, capsys):
    names = ("weights", "scores", "routing", "output")
    assert checks(capsys, 0) == dict.fromkeys(names, "ok")
    path = Path("assets/tiny_expected.json")
    expected = json.loads(path.read_text())
    path.write_text(json.dumps({**expected, "scores": {**expected["scores"], "mean": 2.0}}))
    Image.open("assets/tiny_expected.png").rotate(180).save("assets/tiny_expected.png")
    changed = dict.fromkeys(("scores", "output"), "DIFFER")
    assert checks(capsys, 1) == {**dict.fromkeys(names, "ok"), **changed}
    path.unlink()
    assert checks(capsys, 2) == {}, "nothing is recorded for this model"
