"""A run that is killed at any moment resumes by `--ckpt_path last` and ends with the straight run's adapters."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_twins import run_options

from morsr.cli import main

STEPS = 12


def run(base: Path, out: Path, *more: str) -> multiprocessing.process.BaseProcess:
    """Start a training on dead leaves in a process that can be killed; a checkpoint after every step."""
    keep = (
        '[{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1,'
        ' "save_last": true, "save_on_exception": true}}, {"class_path": "morsr.training.callbacks.AdapterCheckpoint"}]'
    )
    options = [
        *run_options("tiny/mor.yaml", base), "--data.samples_per_epoch=5", f"--trainer.max_steps={STEPS}",
        f"--trainer.logger.init_args.save_dir={out}", f"--trainer.callbacks={keep}", *more,
    ]  # fmt: skip
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(main(options)))
    process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess, out: Path, within_a_write: bool, delay: float) -> None:
    """Kill once there is a checkpoint: after so many seconds, or as soon as a file is being written."""
    while process.is_alive() and not any(path for path in out.rglob("*.ckpt") if not path.name.startswith(".")):
        time.sleep(0.005)
    until = time.monotonic() + delay
    while process.is_alive() and (time.monotonic() < until or within_a_write):
        if within_a_write and time.monotonic() > until and any(out.rglob(".morsr-*")):
            break
        time.sleep(0 if within_a_write else 0.005)
    process.kill()
    process.join()


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_resume_whole(kills: int, small_base: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    straight = run(small_base, tmp_path / "straight")
    straight.join()
    assert straight.exitcode == 0
    length = time.monotonic() - started
    expected = load_file(tmp_path / "straight" / "mor_tiny" / "version_0" / "adapters.safetensors")
    draw = random.Random(kills)
    killed = 0
    for number in range(kills):
        out = tmp_path / str(number)
        process = run(small_base, out)
        kill(process, out, within_a_write=number % 2 == 0, delay=draw.uniform(0, 0.6 * length))
        killed += process.exitcode == -signal.SIGKILL
        resumed = run(small_base, out, "--ckpt_path=last")
        resumed.join()
        assert resumed.exitcode == 0, number
        newest = max((out / "mor_tiny").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))
        torch.testing.assert_close(
            load_file(newest / "adapters.safetensors"), expected, rtol=0, atol=0, msg=str(number)
        )
    assert killed >= kills // 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_started_at_once_keep_a_folder_each(small_base: Path, tmp_path: Path) -> None:
    together = [run(small_base, tmp_path, "--trainer.max_steps=2") for _ in range(4)]
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0] * 4
    folders = sorted(path.name for path in (tmp_path / "mor_tiny").iterdir())
    assert folders == [f"version_{number}" for number in range(4)]
    assert all(path.joinpath("adapters.safetensors").is_file() for path in (tmp_path / "mor_tiny").iterdir())
