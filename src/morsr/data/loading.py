"""DataLoaders whose errors are the ones of the data, and whose place in an epoch can be taken up again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from morsr.errors import MorsrError, told_of_deaths, worker_death


class ImageLoader(DataLoader):
    """A DataLoader that says in one line what went wrong in a worker, or that a worker has died.

    Raises:
        MorsrError: while it is read, an error of the data set, as if it had been read in this process.
        TrainingError: while it is read, a worker has died.
    """

    def __iter__(self) -> Any:
        with _plain_errors():
            batches = super().__iter__()
        # torch tells of a death by a signal, whose error would come up anywhere, in the middle of a step or of the
        # words about another death. From here on a death is found where a batch is waited for, 5 s later at most.
        told_of_deaths()
        return _read(batches)


class TrainingLoader(ImageLoader):
    """An ImageLoader whose position follows from the trainer's progress, so that a run can go on in mid-epoch.

    The two methods tell Lightning that going on is exact; there is nothing to keep, because the data module places the
    sampler by the number of batches that the checkpoint counts as done.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def worker_seed(worker: int) -> None:
    """Keep worker processes to one thread each; they use no generator of their own."""
    torch.set_num_threads(1)


def _read(batches: Iterator[Any]) -> Iterator[Any]:
    with _plain_errors():
        yield from batches


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except MorsrError as error:
        # torch puts the worker's traceback before the message
        words = re.split(r"^morsr\.errors\.\w+: ", str(error), flags=re.MULTILINE)[-1]
        raise type(error)(words.strip()) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        died = worker_death(error)
        if died is None:
            raise
        raise died from error
