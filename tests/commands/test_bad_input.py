"""Commands and bad input: the exit code is 2, one line names what is wrong, and nothing is written."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from morsr.cli import main
from morsr.cli_parser import call

BAD = [
    ("upscal a b", "upscale"),
    ("upscale photo.png", "OUTPUT"),
    ("upscale missing.png out.png", "missing.png"),
    ("upscale photo.png out.png --colour none", "--color"),
    ("upscale photo.png out.png --color red", "--color"),
    ("upscale photo.png out.png --scale big", "--scale"),
    ("upscale photo.png out.png --tile 0", "--tile"),
    ("upscale photo.png out.png --base=", "--base"),
    ("upscale '' out.png", "argument 1"),
    ("upscale sample:dog out.png", "sample:chelsea"),
    ("upscale empty out", "no image"),
    ("upscale photo.png photo.png", "overwrite"),
    ("upscale folder folder", "overwrite"),
    ("upscale folder photo.png", "photo.png"),
    ("upscale photo.png out.docx", ".png"),
    ("upscale folder out --format docx", "docx"),
    ("upscale folder out --format image/png", "image/png"),
    ("upscale twins out --format png", "both become"),
    ("upscale photo.png out.png --color none --color-strength 0.5", "color_strength"),
    ("upscale photo.png out.png --format jpg", "--format"),
    ("score", "--pred"),
    ("score --pred resutls --metrics psnr", "resutls"),
    ("score --pred folder --pred empty", "--pred A B"),
    ("severity missing.png", "missing.png"),
    ("severity photo.png --csv nowhere/a.csv", "nowhere"),
    ("severity photo.png --csv photo.png", ".csv"),
    ("severity photo.png --weights x", "weights"),
    ("severity photo.png --estimator nobody.Mine", "nobody.Mine"),
    ("severity photo.png --estimator learned --weights x.safetensors", "x.safetensors"),
    ("severity photo.png --estimator clip --weights nothing/here", "clip"),
    ("severity photo.png --device abacus", "abacus"),
    ("routing photo.png --out a.pdf", "--out"),
    ("routing photo.png --out a.html --seed 3", "--degrade"),
    ("routing photo.png --out a.html --copies 2", "--degrade"),
    ("routing table.safetensors --out a.html --model other.safetensors", "model's"),
    ("import osedif a.pkl b.safetensors", "PEER"),
    ("import osediff a.pkl b.pkl", ".safetensors"),
    ("export onnx out --dtype float16", "--dtype"),
    ("demo --port 99999", "--port"),
    ("check nowhere.yaml", "nowhere.yaml"),
    ("check --config nowhere.yaml", "morsr check CONFIG"),
]


@pytest.fixture(autouse=True)
def files():
    for name in ("folder", "empty", "twins"):
        Path(name).mkdir()
    for name in ("photo.png", "folder/a.png", "twins/a.png", "twins/a.jpg"):
        Image.new("RGB", (96, 80)).save(name)
    Path("table.safetensors").touch()


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_it_is_refused_in_one_line_that_names_it(line, words, capsys):
    import shlex

    before = sorted(Path().rglob("*"))
    assert main(shlex.split(line)) == 2
    said = capsys.readouterr().err
    assert said.startswith("morsr: ")
    assert said.count("\n") == 1
    assert len(said) <= 400
    assert words in said
    assert sorted(Path().rglob("*")) == before


def test_help_lists_every_command_and_option(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("fit", "check", "upscale", "import", "schema"):
        assert f"  {name} " in listed
    with pytest.raises(SystemExit) as stopped:
        main(["upscale", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--color-strength" in shown
    assert "class '" not in shown


def test_help_loads_no_torch():
    code = "import sys; from morsr.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_values_like_yaml_come_as_written():
    seen = []

    def run(place: Path, *, label: str | None = None, many: list[str] | None = None, flag: bool = False) -> int:
        """Do something."""
        seen.append((place, label, many, flag))
        return 0

    odd = "café: [1"
    assert call(run, "x", [odd, "--label", odd, "--many", odd, "yes", "--flag"]) == 0
    assert call(run, "x", ["~/3", "--label=-1"]) == 0
    assert seen == [(Path(odd), odd, [odd, "yes"], True), (Path.home() / "3", "-1", None, False)]
