"""What the loaders say when something is wrong in a worker, or with the worker itself."""

import os
import signal

import pytest
from torch.utils.data import Dataset

from morsr.data.loading import ImageLoader
from morsr.errors import ConfigError, InputError, TrainingError


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
def test_an_error_of_the_data_is_one_line_from_any_process(workers, kind):
    loader = ImageLoader(Faulty(kind("a.png: broken,\nexpected a picture")), batch_size=1, num_workers=workers)
    with pytest.raises(kind) as caught:
        list(loader)
    assert str(caught.value) == "a.png: broken,\nexpected a picture"


def test_a_worker_that_dies_is_said_to_have_died_once():
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(TrainingError, match=r"has died .* last checkpoint"):
            list(ImageLoader(Faulty(None), num_workers=1))
        signal.raise_signal(signal.SIGCHLD)  # torch would raise it again, wherever the main thread is
    finally:
        signal.signal(signal.SIGCHLD, before)
