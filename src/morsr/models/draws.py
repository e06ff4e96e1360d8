"""Random numbers of a training step, keyed by run, step and sample.

The same sample of the same step gets the same draws on every device, in every split of the batch and in a resumed run,
so there is no generator's state to save.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from morsr.degradation.keys import mix, sample_keys, uniforms


class Draws:
    """Named streams of random numbers, one row per image.

    Args:
        keys: (B,) int64, one per image.

    >>> draws = Draws.of_step(seed=0, step=3, first=0, count=4, device=torch.device("cpu"))
    >>> bool((draws.normal("noise", (2, 2))[2:] == draws[2:4].normal("noise", (2, 2))).all())
    True
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    @classmethod
    def of_step(cls, *, seed: int, step: int, first: int, count: int, device: torch.device) -> Draws:
        """Draws of one generator step for the samples `first` to `first + count` of the batch over all devices."""
        return cls(sample_keys(seed, step, torch.arange(first, first + count, device=device)))

    def __getitem__(self, images: slice) -> Draws:
        return Draws(self.keys[images])

    def _stream(self, name: str) -> Tensor:
        return mix(self.keys ^ zlib.crc32(name.encode()))

    def timesteps(self, name: str, low: int, high: int) -> Tensor:
        """One timestep per image, uniform over low..high, both included; (B,) int64."""
        span = high - low + 1
        return low + (uniforms(self._stream(name), 1)[:, 0] * span).long().clamp(max=span - 1)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape), float32, by the inverse of the distribution function."""
        # Half of the last bit is added, because 0 would give minus infinity.
        uniform = uniforms(self._stream(name), math.prod(shape)).mul_(2).add_(2.0**-53 - 1)
        return (uniform.erfinv_() * 2**0.5).float().view(-1, *shape)
