"""`morsr compare` of two folders of runs, one run per seed, as `make ablation` leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest

from morsr.cli import main


def write_run(row: str, seed: int, psnr: float) -> None:
    folder = Path(row, f"seed_{seed}", "scores")
    folder.mkdir(parents=True)
    lines = [f"{name},morsr,{psnr + place},{name}" for place, name in enumerate(("a", "b", "c"))]
    for step, text in (("000100", ["x,morsr,1,x"]), ("000300", lines)):
        (folder / f"step_{step}.csv").write_text("\n".join(["image,method,psnr,group", *text]) + "\n")


def test_last_tables_of_all_seeds_are_paired(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_run("lora", seed, 20.0)
        write_run("mor", seed, 21.0 + seed)
    assert main(["compare", "lora", "mor"]) == 0
    shown = capsys.readouterr().out
    assert "+1.5000" in shown
    assert "| 6 |" in shown, "three images under two seeds"
    assert "| 3 |" in shown, "three photographs are resampled"


def test_a_folder_without_scores_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert main(["compare", "empty", "empty"]) == 2
    assert "empty: expected runs" in capsys.readouterr().err
