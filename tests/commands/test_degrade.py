"""`morsr degrade`: pairs that replay, runs that resume, and what is refused before anything is written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from morsr.cli_parser import call
from morsr.commands import degrade as command
from morsr.degradation import DegradationRecipe, apply
from morsr.errors import ConfigError, InputError


def run(line: str) -> int:
    return call(command.run, "degrade", line.split())


def pixels(path: str) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.fixture(autouse=True)
def photos():
    """Three photographs of different kinds, one in a subfolder."""
    from skimage import data

    Path("photos/more").mkdir(parents=True)
    Image.fromarray(data.astronaut()[:98, :131]).save("photos/a.png")
    Image.fromarray(data.coffee()[:64, :80]).save("photos/more/b.jpg", quality=95)
    Image.fromarray(data.camera()[:64, :64]).save("photos/gray.png")


def test_a_folder_with_parameters_that_replay():
    assert run("photos lr --seed 3 --hr hr") == 0
    rows = [json.loads(line) for line in Path("lr/parameters.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["a.png", "gray.png", "more/b.png"]
    assert all(0 <= row["severity"]["combined"] <= 1 and row["seed"] == 3 for row in rows)
    parameters = DegradationRecipe.load("realesrgan").sample(torch.tensor([row["key"] for row in rows]))
    for place, row in enumerate(rows):
        sharp, made = pixels(f"hr/{row['file']}"), pixels(f"lr/{row['file']}")
        assert sharp.shape[:2] == (4 * made.shape[0], 4 * made.shape[1])
        images = torch.from_numpy(sharp).permute(2, 0, 1).unsqueeze(0).float() / 255
        again = (apply(images, parameters[place]) * 255).round()[0].permute(1, 2, 0)
        np.testing.assert_array_equal(again.numpy(), made)


def test_an_image_depends_on_its_name_and_the_seed_alone():
    for line in ("photos all", "photos/a.png one", "photos/a.png other --seed 1"):
        assert run(line) == 0
    every, one, other = (pixels(f"{name}/a.png") for name in ("all", "one", "other"))
    np.testing.assert_array_equal(every, one)
    assert (every != other).any()


def test_what_cannot_be_read_is_named_and_the_rest_is_made(capsys):
    Path("photos/broken.png").write_bytes(Path("photos/a.png").read_bytes()[:500])
    Image.new("RGB", (3, 9)).save("photos/small.png")
    Image.new("RGB", (12, 12)).save("photos/aa_less_than_four_lr_pixels.png")
    assert run("photos lr") == 1
    said = capsys.readouterr().err
    for words in ("broken.png", "small.png", "aa_less_than", "3 of 6"):
        assert words in said
    assert len(Path("lr/parameters.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("photos lr --recipe none", ConfigError),
        ("photos lr --scale 0", ConfigError),
        ("photos lr --device quantum", ConfigError),
        ("photos lr --device meta", ConfigError),
        (f"photos lr --seed={2**63}", ConfigError),
        ("nothing lr", InputError),
        ("photos photos", InputError),
        ("photos photos/lr", InputError),
        ("photos lr --hr photos/more/sharp", InputError),
        ("photos lr --hr lr", InputError),
        ("photos/a.png photos", InputError),  # would overwrite its input
        ("photos/a.png lr --hr photos", InputError),
        ("twins lr", InputError),  # two images of one stem
        ("photos file/lr", NotADirectoryError),
        ("photos full", InputError),  # outputs that exist
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(line, error):
    for name in ("twins/a.png", "twins/a.bmp", "full/a.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(name)
    Path("file").write_text("")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(error):
        run(line)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_killed_run_goes_on_and_ends_alike():
    for name in ("whole", "cut"):
        assert run(f"photos {name}") == 0
    Path("cut/more/b.png").unlink()  # killed before the last image
    made = Path("cut/a.png").stat().st_mtime_ns
    assert run("photos cut") == 0
    assert Path("cut/a.png").stat().st_mtime_ns == made
    for name in ("parameters.jsonl", "a.png", "gray.png", "more/b.png"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name
    for other in ("--seed 1", "--scale 2", "--recipe pisasr", "--hr sharp"):
        with pytest.raises(InputError):
            run(f"photos cut {other}")
    Path("photos/gray.png").write_bytes(b"damaged since")
    assert run("photos cut --seed 1 --overwrite") == 1
    assert Path("cut/a.png").read_bytes() != Path("whole/a.png").read_bytes()
    assert Path("cut/gray.png").read_bytes() == Path("whole/gray.png").read_bytes()  # not lost


def test_any_class_with_sample_degrades():
    Path("mine.py").write_text(
        "from morsr.degradation import DegradationRecipe\n"
        "class Rain:\n    def sample(self, keys):\n        return DegradationRecipe().sample(keys)\n"
    )
    assert run("photos lr --recipe mine.Rain") == 0
    assert json.loads(Path("lr/parameters.jsonl").read_text().splitlines()[0])["recipe"] == "Rain"
