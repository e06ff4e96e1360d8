"""DataLoaders whose errors are the ones of the data, and that resume within an epoch."""

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
        told_of_deaths()  # a death is found where a batch is waited for, not in the middle of a step
        return _read(batches)


class TrainingLoader(ImageLoader):
    """An ImageLoader that resumes within an epoch: the data module places its sampler, and keeps nothing here."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def one_thread(worker: int) -> None:
    """Keep a worker process to one thread."""
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
