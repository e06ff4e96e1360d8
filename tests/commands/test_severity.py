"""`morsr severity`: table, CSV, and one clear line for whatever cannot be scored."""

import csv

import numpy as np
import pytest
from PIL import Image

from morsr.cli import main


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "images"
    (place / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    smooth = np.tile(np.linspace(40, 200, 64), (48, 1))[..., None].repeat(3, axis=2)
    Image.fromarray(smooth.astype(np.uint8)).save(place / "smooth.png")
    noisy = np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(place / "sub" / "noisy.png")
    Image.fromarray(noisy[..., 0]).save(place / "gray.png")
    return place


def test_folder_to_table_and_csv(folder, capsys):
    assert main(["severity", str(folder), "--csv", "scores.csv"]) == 0
    shown = capsys.readouterr().out
    assert "sub/noisy.png" in shown
    assert "severity" in shown
    assert "mean" in shown
    with open("scores.csv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"smooth.png", "gray.png", "sub/noisy.png"}
    assert float(rows["sub/noisy.png"]["noise"]) > float(rows["smooth.png"]["noise"]) + 0.3
    severities = [float(row["severity"]) for row in rows.values()]
    assert severities == sorted(severities, reverse=True)


def test_a_broken_file_does_not_stop_a_folder(folder, capsys):
    (folder / "cut.png").write_bytes((folder / "smooth.png").read_bytes()[:60])
    assert main(["severity", str(folder)]) == 1
    streams = capsys.readouterr()
    assert "cut.png" in streams.err
    assert "smooth.png" in streams.out
