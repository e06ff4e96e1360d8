"""Which image a training sample is made of, as a pure function of (seed, epoch, place in the epoch).

Nothing here has a state that workers could advance differently: the same run gives the same samples with any number of
workers, and a run that goes on from a checkpoint starts at the sample where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.utils.data import DistributedSampler


def stratified_share(index: np.ndarray | int, share: float) -> Any:
    """How many of the samples before `index` are synthetic, spread evenly: any run of n holds share * n of them, ±1."""
    return np.floor(np.multiply(index, share) + 1e-9).astype(np.int64)


class PassOrder:
    """A shuffled order of the images for every pass; with equal weights each image comes once per pass.

    With unequal weights image i comes n w_i / sum(w) times per pass, rounded up or down at random (systematic
    resampling, the draw of least variance with the right expectation).

    Args:
        weights: float (n,), above 0.
        seed: of the run.
    """

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        self.seed = seed
        self._edges = np.cumsum(weights / weights.sum()) * len(weights)
        self._edges[-1] = len(weights)
        self._kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._edges)

    def __call__(self, position: int) -> int:
        """Number of the image at a position of the endless sequence of passes."""
        number, place = divmod(position, len(self))
        if number not in self._kept:
            generator = np.random.default_rng([self.seed % 2**64, number])
            points = np.arange(len(self)) + generator.uniform()
            # two passes may be open at once, at the seam between them
            self._kept = dict(list(self._kept.items())[-1:])
            self._kept[number] = generator.permutation(np.searchsorted(self._edges, points, side="right"))
        return int(min(self._kept[number][place], len(self) - 1))


class EpochSampler(DistributedSampler):
    """Yields sample numbers, epoch * samples_per_epoch + place; every new iterator is the next epoch.

    Devices get whole batches in turn, so that synthetic images are spread over devices as evenly as over batches.
    It is a DistributedSampler so that Lightning leaves it as it is.

    Args:
        batches: per epoch and device.
        batch_size: samples per batch and device.
        epoch: number of the first epoch.
        start: batches of the first epoch that were seen before a checkpoint, and are passed over.
        replicas, rank: number of devices and which one this is.
    """

    def __init__(
        self, *, batches: int, batch_size: int, epoch: int = 0, start: int = 0, replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(range(batches), num_replicas=replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batches, self.batch_size = batches, batch_size
        self.next_epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        epoch, start = self.next_epoch, self.start
        self.next_epoch, self.start = epoch + 1, 0
        per_epoch = len(self) * self.num_replicas
        for batch in range(start, self.batches):
            first = epoch * per_epoch + (batch * self.num_replicas + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)


def fit_runs(trainer: Any) -> bool:
    """Whether a trainer fits at this moment; it stays with its data module, and keeps its function, afterwards."""
    state = None if trainer is None else trainer.state
    return state is not None and (state.fn, state.status) == (TrainerFn.FITTING, TrainerStatus.RUNNING)


def limited_batches(trainer: Any, batches: int) -> int:
    """Batches per epoch that the trainer's limit_train_batches leaves, at least 1."""
    limit = None if trainer is None else trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(1, batches)


def epoch_batches(samples: int, batch_size: int, replicas: int) -> int:
    """Batches per device that cover so many samples."""
    return max(1, math.ceil(samples / (batch_size * replicas)))
