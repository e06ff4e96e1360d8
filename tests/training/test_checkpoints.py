"""Checkpoint files: whole or refused, never unpickled, and found again after an accident."""

import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from morsr.errors import WeightsError
from morsr.training.checkpoints import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from morsr.training.cli import claim_folder


def save(path: Path, step: int = 0, **more: Any) -> Path:
    tensors = {"a": torch.arange(37.0), "b": torch.randn(5, 3), "c": torch.zeros(1)}
    AtomicCheckpointIO().save_checkpoint({"state_dict": tensors, "global_step": step, **more}, path)
    return path


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """Bits without a checksum hold no value: dates, paddings and names of the archive."""
    path = save(tmp_path / "whole.ckpt", step=5)
    whole, expected = path.read_bytes(), read_checkpoint(path)
    draw, refused = random.Random(0), 0
    for place in [draw.randrange(len(whole)) for _ in range(200)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            torch.testing.assert_close(read_checkpoint(path), expected, rtol=0, atol=0)
        except WeightsError:
            refused += 1
    assert refused > 50


def test_the_newest_is_chosen_by_run_and_recorded_step(tmp_path):
    runs = [tmp_path / f"version_{number}" for number in (2, 1, 0)]
    save(runs[1] / "checkpoints" / "z.ckpt", step=3)
    best = save(runs[1] / "checkpoints" / "step-4-val" / "psnr=20.ckpt", step=9)  # {val/psnr} in a file's name
    save(runs[2] / "checkpoints" / "last.ckpt", step=100)
    os.utime(best, (0, 0))
    assert newest_checkpoint(runs) == best
    best.write_bytes(best.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="passed over"):
        assert newest_checkpoint(runs) == runs[1] / "checkpoints" / "z.ckpt"
    (runs[1] / "checkpoints" / "z.ckpt").unlink()
    with pytest.warns(UserWarning, match="passed over"):
        assert newest_checkpoint(runs) == runs[2] / "checkpoints" / "last.ckpt"
    assert newest_checkpoint(runs[:1]) is None
    assert newest_checkpoint(runs, resumes=True) is None, "files of weights alone"
    save(runs[2] / "checkpoints" / "whole.ckpt", step=7, optimizer_states=[], loops={})
    assert newest_checkpoint(runs, resumes=True) == runs[2] / "checkpoints" / "whole.ckpt"


def test_what_a_killed_process_left_is_removed_and_what_is_being_written_stays(tmp_path):
    whole = save(tmp_path / "last.ckpt", step=3)
    left, writing = tmp_path / ".morsr-00.part.ckpt", tmp_path / ".morsr-11.part.ckpt"
    for path in (left, writing):
        path.write_bytes(whole.read_bytes()[:100])
    os.utime(left, (0, 0))
    assert newest_checkpoint([tmp_path]) == whole
    assert not left.exists()
    assert writing.exists()


def test_runs_started_together_get_folders_of_their_own(tmp_path):
    start, found = threading.Barrier(8), []

    def claim() -> None:
        logger = TensorBoardLogger(tmp_path, name="run")
        start.wait()
        found.append(claim_folder(logger))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in found) == [f"version_{number}" for number in range(8)]
