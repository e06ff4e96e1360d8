"""`morsr predict`: every file once over one and two processes, resumable, failures told at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from training_twins import build

from morsr.cli import main
from morsr.data.files import ImageFiles
from morsr.errors import ConfigError, InputError
from morsr.models.restorer import Restorer

CONFIG = Path(__file__).resolve().parents[2] / "experiments" / "predict_tiny.yaml"


def photo(name: str, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(sum(name.encode())).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(values).convert(mode).save(name)


def predict(*options: str) -> list[str]:
    return [
        "predict", "--config", str(CONFIG), "--data.folders=[photos]", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--model.scale=2", *options,
    ]  # fmt: skip


def made() -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to("restored")): Image.open(path).size
        for path in sorted(Path("restored").rglob("*"))
        if path.is_file()
    }


def test_a_folder_is_restored_and_goes_on_where_it_was(capsys: pytest.CaptureFixture[str]):
    photo("photos/a.png")
    photo("photos/sub/b.jpg", (8, 12))
    photo("photos/sub/c.png", mode="RGBA")
    Path("restored").mkdir()
    Path("restored/a.png").write_bytes(b"made before")
    Path("config.yaml").write_text("a file of the user's")
    assert main(predict("--data.batch_size=2")) == 0
    assert Path("restored/a.png").read_bytes() == b"made before"
    Path("restored/a.png").unlink()
    before = Path("restored/sub/b.jpg").stat().st_mtime_ns
    assert main(predict()) == 0
    assert made() == {"a.png": (24, 16), "sub/b.jpg": (16, 24), "sub/c.png": (24, 16)}
    assert Image.open("restored/sub/c.png").mode == "RGBA"
    assert Path("restored/sub/b.jpg").stat().st_mtime_ns == before
    assert Path("config.yaml").read_text() == "a file of the user's"
    Restorer.from_pretrained("tiny", device="cpu").restore_file("photos/a.png", "alone.png", scale=2)
    np.testing.assert_array_equal(np.asarray(Image.open("alone.png")), np.asarray(Image.open("restored/a.png")))


def test_what_fails_is_told_at_the_end_and_nothing_half_written_stays(capsys: pytest.CaptureFixture[str]):
    photo("photos/a.png")
    Path("photos/text.png").write_text("Dear Sir or Madam")
    assert main(predict()) == 2
    told = capsys.readouterr().err
    assert "1 files could not be restored" in told
    assert "text.png: not a PNG" in told
    assert list(made()) == ["a.png"]


@pytest.mark.slow
def test_two_processes_restore_each_file_once():
    for index in range(5):
        photo(f"photos/{index}.png", (12 - index, 8))
    Path("photos/5.png").write_text("not an image")
    options = predict("--trainer.devices=2", "--trainer.strategy=ddp")
    done = subprocess.run(
        [sys.executable, "-m", "morsr", *options], capture_output=True, text=True, timeout=240, env=dict(os.environ)
    )
    assert made() == {f"{index}.png": (24 - 2 * index, 16) for index in range(5)}
    assert "5 images restored" in done.stdout + done.stderr, done.stderr[-2000:]
    assert "5.png: not a PNG" in done.stderr
    assert done.returncode != 0
    Path("photos/5.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in Path("restored").iterdir()}
    Path("restored/3.png").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "morsr", *options], capture_output=True, text=True, timeout=240, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    after = {path: path.stat().st_mtime_ns for path in Path("restored").iterdir()}
    assert {path for path in before if before[path] != after[path]} == {Path("restored/3.png")}


def test_files_of_equal_size_follow_each_other():
    for index, size in enumerate([(12, 8), (8, 12), (12, 8)]):
        photo(f"photos/{index}.png", size)
    data = ImageFiles(folders=["photos"], batch_size=2)
    data.setup("predict")
    assert [job.source.name for job in data.jobs] == ["0.png", "2.png", "1.png"]
    batches = list(data.predict_dataloader())
    assert [[job.target.name for job, _ in batch] for batch in batches] == [["0.png", "2.png"], ["1.png"]]
    assert data.leave_out(lambda job: job.target == Path("2.png")) == 1
    frames = ImageFiles(folders=["photos"], by_size=False)
    frames.setup("predict")
    assert [job.source.name for job in frames.jobs] == ["0.png", "1.png", "2.png"]
    assert frames.first_of == {Path("photos"): Path("photos/0.png")}


def test_two_inputs_that_a_format_makes_one_output_are_refused(capsys: pytest.CaptureFixture[str]):
    photo("photos/a.png")
    photo("photos/a.jpg")
    writer = "--trainer.callbacks.init_args.format=png"
    assert main(predict(writer)) == 2
    assert "both become" in capsys.readouterr().err
    assert not Path("restored").exists()


def test_a_config_without_a_writer_is_refused(small_base: Path, capsys: pytest.CaptureFixture[str]):
    """Everything was restored and nothing written, with exit code 0."""
    photo("photos/a.png")
    options = [
        "predict", "--config", str(CONFIG.parent / "mor_tiny.yaml"), "--data.predict=[photos]",
        f"--model.base={small_base}", "--model.adapters.targets=[sd_unet@unet]", "--trainer.accelerator=cpu",
        "--trainer.logger=false", "--trainer.callbacks=[]",
    ]  # fmt: skip
    assert main(options) == 2
    told = capsys.readouterr().err
    assert "trainer.callbacks: expected a prediction writer, got none" in told
    assert "experiments/predict_tiny.yaml" in told


def test_python_may_take_what_is_returned(small_base: Path, tmp_path: Path):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    module = build(small_base)
    module.save_adapters(tmp_path / "a.safetensors")
    module = build(small_base, weights=str(tmp_path / "a.safetensors"))
    images = DataLoader([{"lr": torch.rand(1, 3, 8, 8), "stem": ["a"]}], batch_size=None)
    (found,) = trainer.predict(module, images) or []
    assert found["sr"].shape == (1, 3, 32, 32)
    with pytest.raises(ConfigError, match="expected a prediction writer"):
        trainer.predict(module, images, return_predictions=False)


def test_what_cannot_work_is_refused():
    for wrong in ({"folders": []}, {"folders": "photos"}, {"folders": ["photos"], "batch_size": 0}):
        with pytest.raises(ConfigError, match="expected"):
            ImageFiles(**wrong)
    with pytest.raises(InputError, match="there is none"):
        ImageFiles(folders=["nowhere"]).setup("predict")
    photo("one/a.png")
    photo("two/a.png")
    with pytest.raises(InputError, match="both become"):
        ImageFiles(folders=["one", "two"]).setup("predict")
