"""What the loaders say when something is wrong in a worker, or with the worker itself."""

from __future__ import annotations

import os
import signal

import pytest
from torch.utils.data import Dataset

from morsr.data.loading import ImageLoader
from morsr.errors import ConfigError, InputError, TrainingError, worker_death


class Faulty(Dataset[int]):
    """Numbers up to 4; the third is an error."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> int:
        if place == 2 and self.error is not None:
            raise self.error
        if place == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return place


@pytest.mark.parametrize(("workers", "kind"), [(0, InputError), (1, ConfigError)])
def test_an_error_of_the_data_is_one_line_from_any_process(workers: int, kind: type[Exception]) -> None:
    loader = ImageLoader(Faulty(kind("a.png: broken,\nexpected a picture")), batch_size=1, num_workers=workers)
    with pytest.raises(kind) as caught:
        list(loader)
    assert str(caught.value) == "a.png: broken,\nexpected a picture"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(KeyError, match=r"(?s)Traceback.*a mistake of ours"):
        list(ImageLoader(Faulty(KeyError("a mistake of ours")), batch_size=1, num_workers=1))


def test_other_errors_are_no_deaths() -> None:
    assert worker_death(RuntimeError("CUDA out of memory")) is None
    assert worker_death(ValueError("DataLoader worker (pid 3)")) is None
    assert worker_death(ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0.")) is None
    assert worker_death(ConnectionResetError(104, "Connection reset by peer")) is not None


def test_a_worker_that_dies_is_said_to_have_died_once() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(TrainingError, match=r"has died .* last checkpoint"):
            list(ImageLoader(Faulty(None), num_workers=1))
        signal.raise_signal(signal.SIGCHLD)  # torch would raise it again, wherever the main thread is
    finally:
        signal.signal(signal.SIGCHLD, before)
