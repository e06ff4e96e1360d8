"""`morsr upscale`: files and folders, resuming, what fails and what is never touched."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import restorer_twins as twins
from PIL import Image

from morsr.cli import main
from morsr.restoring import Restorer, Settings


@pytest.fixture(autouse=True)
def model(monkeypatch):
    """A fake model in place of the shipped one, with what it was asked for."""
    restorer = twins.fake()
    restorer.asked = []  # type: ignore[attr-defined]

    def from_pretrained(name: str, **options: object) -> Restorer:
        restorer.asked.append((name, options))  # type: ignore[attr-defined]
        return restorer

    monkeypatch.setattr(Restorer, "from_pretrained", from_pretrained)
    return restorer


photo = partial(twins.photo, size=(12, 9))


def sizes(folder: str) -> dict[str, tuple[int, int]]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): Image.open(path).size for path in paths}


def test_a_file_becomes_a_file(model, capsys):
    photo("photo.jpg")
    assert main(["upscale", "photo.jpg", "new/out.png"]) == 0
    assert Image.open("new/out.png").size == (48, 36)
    assert "out.png" in capsys.readouterr().err
    defaults = {**dict.fromkeys(("base", "prompt", "estimator", "router")), "device": "auto", "dtype": "auto"}
    assert model.asked == [("tiny", defaults)]  # type: ignore[attr-defined]


def test_options_reach_the_restorer(model, monkeypatch):
    seen = {}
    monkeypatch.setattr(model, "restore_file", lambda source, target, **options: seen.update(options))
    monkeypatch.setattr(Settings, "check_model", lambda self, generator: None)
    photo("photo.png")
    settings = {"scale": 1.5, "tile": 256, "color": "adain", "color_strength": 0.5, "strength": 0.7}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    assert main(["upscale", "photo.png", "out.webp", *options, "--model", "m", "--base", "b"]) == 0
    seen.pop("progress")
    assert seen == {**settings, "routing": None}
    name, given = model.asked[0]  # type: ignore[attr-defined]
    assert (name, given["base"]) == ("m", "b")


def test_a_folder_is_restored_with_its_subfolders():
    photo("in/a.png")
    photo("in/sub/b.jpg", size=(7, 5))
    photo("in/sub/gray.TIF", mode="L")
    assert main(["upscale", "in", "out", "--scale", "2"]) == 0
    assert sizes("out") == {"a.png": (24, 18), "sub/b.jpg": (14, 10), "sub/gray.TIF": (24, 18)}
    assert Image.open("out/sub/gray.TIF").mode == "L"


def test_a_format_for_one_file_and_for_all():
    photo("photo.png")
    assert main(["upscale", "photo.png", "plain", "--format", "webp", "--scale", "2"]) == 0
    assert Image.open("plain/photo.webp").format == "WEBP"
    photo("in/a.png")
    photo("in/b.jpg")
    assert main(["upscale", "in", "out", "--format", "webp"]) == 0
    assert sorted(sizes("out")) == ["a.webp", "b.webp"]
    assert {Image.open(f"out/{name}").format for name in sizes("out")} == {"WEBP"}


def test_a_stopped_run_goes_on_where_it_was(model, capsys):
    for name in "abc":
        photo(f"in/{name}.png")
    Path("out").mkdir()
    Path("out/b.png").write_bytes(b"made before")
    assert main(["upscale", "in", "out"]) == 0
    assert Path("out/b.png").read_bytes() == b"made before"
    assert "1 of 3 outputs exist" in capsys.readouterr().err
    assert len(model.generator.sizes) == 2
    assert main(["upscale", "in", "out"]) == 0
    assert len(model.generator.sizes) == 2
    assert main(["upscale", "in", "out", "--scale", "9"]) == 2, "a wrong setting is told though there is nothing to do"
    assert main(["upscale", "in", "out", "--overwrite"]) == 0
    assert Image.open("out/b.png").size == (48, 36)


def test_outputs_inside_the_input_folder_are_not_inputs_of_the_next_run():
    photo("in/a.png")
    assert main(["upscale", "in", "in/out"]) == 0
    assert main(["upscale", "in", "in/out", "--overwrite"]) == 0
    assert sizes("in") == {"a.png": (12, 9), "out/a.png": (48, 36)}
    Path("picked").mkdir()
    Path("picked/b.png").symlink_to(Path("in/out/a.png").absolute())  # of an earlier run, and chosen
    assert main(["upscale", "picked", "in/out", "--scale", "1"]) == 0
    assert sizes("in/out") == {"a.png": (48, 36), "b.png": (48, 36)}


def test_a_failed_file_does_not_stop_the_others(capsys):
    photo("in/a.png")
    Path("in/b.png").write_text("not an image")
    Path("in/c.png").write_bytes(b"")
    photo("in/d.png")
    assert main(["upscale", "in", "out"]) == 1
    told = capsys.readouterr().err
    assert "2 of 4 images restored" in told
    assert "2 failed" in told
    assert "in/b.png: not a PNG" in told
    assert "in/c.png: the file is empty" in told
    assert sorted(sizes("out")) == ["a.png", "d.png"], "nothing half-written"


@pytest.mark.parametrize(("output", "made"), [("./", "a.png"), ("new/", "new/a.png"), ("in/", None)])
def test_a_folder_as_output_of_one_file_takes_its_name(output, made):
    """As `cp` does, also for / itself; never over the input."""
    photo("in/a.png")
    before = Path("in/a.png").read_bytes()
    assert main(["upscale", "in/a.png", output, "--scale", "1"]) == (2 if made is None else 0)
    assert made is None or Path(made).is_file()
    assert Path("in/a.png").read_bytes() == before


def test_processes_share_a_folder(monkeypatch):
    for index in range(5):
        photo(f"in/{index}.png")
    monkeypatch.setenv("WORLD_SIZE", "2")  # without torchrun none waits for another
    for rank, names in ((1, {"1.png", "3.png"}), (0, {"0.png", "1.png", "2.png", "3.png", "4.png"})):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["upscale", "in", "out", "--scale", "1"]) == 0
        assert set(sizes("out")) == names


@pytest.mark.slow
def test_a_file_that_fails_in_one_process_of_torchrun_costs_no_other():
    for index in range(8):
        twins.photo(f"in/{index}.png", (16, 16) if index % 2 == 0 else (96, 96))
    Path("in/0.png").write_bytes(b"no picture")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "morsr"]
    ended = subprocess.run([*command, "upscale", "in", "out", "--device=cpu"], timeout=250, check=False)
    assert ended.returncode == 1
    assert set(sizes("out")) == {f"{index}.png" for index in range(1, 8)}
