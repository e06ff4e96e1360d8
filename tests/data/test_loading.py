"""What is said when a process that reads the data dies, or meets an error of its own."""

from __future__ import annotations

import os
import signal

import pytest
from torch.utils.data import Dataset

from morsr.data.loading import ImageLoader
from morsr.errors import InputError, TrainingError, worker_death


class Fatal(Dataset):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> int:
        if place == 2 and self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if place == 2:
            raise InputError("b.png: no picture")
        return place


def test_a_worker_that_dies_is_told_in_one_line() -> None:
    with pytest.raises(TrainingError, match=r"a process that reads the data has died.*last checkpoint") as caught:
        list(ImageLoader(Fatal("killed"), num_workers=1))
    assert "\n" not in str(caught.value)


def test_an_error_in_a_worker_reads_as_if_it_had_happened_here() -> None:
    with pytest.raises(InputError) as caught:
        list(ImageLoader(Fatal("broken"), num_workers=1))
    assert str(caught.value) == "b.png: no picture"


def test_other_errors_are_no_deaths() -> None:
    assert worker_death(RuntimeError("CUDA out of memory")) is None
    assert worker_death(ValueError("DataLoader worker (pid 3)")) is None
