"""A run that is killed at any moment resumes by `--ckpt_path last` and ends with the straight run's adapters."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_twins import run_options

from morsr.training.cli import MorsrCLI, run

STEPS = 5
RUNS = "runs/mor_tiny"


class ParsedOnce(MorsrCLI):
    """Parses the command line in one process; those that are forked from it save the seconds that this takes."""

    settings: Any = None
    ckpt_path: str | None = None

    def parse_arguments(self, parser: Any, args: Any) -> None:
        if self.settings is None:
            super().parse_arguments(parser, args)
            ParsedOnce.settings = self.config
        self.config = self.settings.clone()
        self.config.fit.ckpt_path = self.ckpt_path


def train(base: Path, folder: Path, ckpt_path: str | None = None) -> int:
    """Train on dead leaves with a checkpoint after every step."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    ParsedOnce.ckpt_path = ckpt_path
    every = {"every_n_train_steps": 1, "save_last": True, "save_on_exception": True}
    keep = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": every},
        {"class_path": "morsr.training.callbacks.AdapterCheckpoint"},
    ]
    return run(run_options("tiny/mor.yaml", base, samples=5, max_steps=STEPS, callbacks=keep), ParsedOnce)


def start(*arguments: Any) -> multiprocessing.process.BaseProcess:
    """The same in a process that can be killed."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(train(*arguments)))
    process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess, folder: Path, *, writes: int, delay: float) -> bool:
    """Kill within one of its next writes, or for 0 writes after so many CPU seconds; False if it has finished."""
    parts = f"{RUNS}/*/checkpoints/.morsr-*"
    before, seen = set(folder.glob(parts)), set()
    while process.is_alive():
        seen |= set(folder.glob(parts)) - before
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11]
        if len(seen) >= writes if writes else int(ticks) > delay * os.sysconf("SC_CLK_TCK"):
            break
        time.sleep(0.01)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_resume_whole(kills, small_base, tmp_path):
    # in a new process: one in which other tests have started autograd's threads cannot be forked
    process = multiprocessing.get_context("spawn").Process(target=kill_and_resume, args=(kills, small_base, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


def kill_and_resume(kills: int, small_base: Path, tmp_path: Path) -> None:
    """Every killed run is resumed, and the resumed one may be killed again; what ends is the straight run."""
    assert train(small_base, tmp_path / "straight") == 0
    expected = load_file(tmp_path / "straight" / RUNS / "version_0" / "adapters.safetensors")
    draw, killed, chain = random.Random(kills), 0, 0
    while killed < kills:
        chain += 1
        folder = tmp_path / str(chain)
        process = start(small_base, folder)
        while killed < kills and kill(
            process, folder, writes=draw.randint(1, 4) * (killed % 2 == 0), delay=draw.uniform(0.2, 4)
        ):
            killed += 1
            process = start(small_base, folder, "last")
        process.join()
        assert process.exitcode == 0, killed
        newest = max((folder / RUNS).iterdir(), key=lambda path: int(path.name.removeprefix("version_")))
        made = load_file(newest / "adapters.safetensors")
        torch.testing.assert_close(made, expected, rtol=0, atol=0, msg=str(killed))
    assert len(list(tmp_path.rglob(".morsr-*"))) >= kills // 4, "files that were being written"
