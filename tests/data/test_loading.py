"""What the loaders say when something is wrong in a worker, or with the worker itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from morsr.data.loading import ImageLoader
from morsr.errors import ConfigError, InputError, worker_death


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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [InputError, ConfigError])
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
    # In a process of its own: torch raises the death of a worker in the main thread, wherever that is.
    program = (
        "import signal\nfrom test_loading import Faulty, ImageLoader\n"
        "try: list(ImageLoader(Faulty(None), num_workers=1))\n"
        "except Exception as error: signal.raise_signal(signal.SIGCHLD); print(type(error).__name__, error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("TrainingError a process that reads the data has died ("), done.stderr
    assert done.stdout.endswith("Go on from the last checkpoint, which is whole\n")
