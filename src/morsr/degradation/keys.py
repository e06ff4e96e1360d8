"""Random numbers keyed by sample: the same key gives the same draw, whatever the batch, worker or device.

A key is one int64 per image. Draws come from a counter-based generator (splitmix64): draw number n of key k is a hash
of (k, n), so no draw depends on how many were made before it or on the rest of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from morsr.errors import ConfigError

# splitmix64's constants, as signed numbers
STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def mix(values: Tensor) -> Tensor:
    """Hash int64 values, one to one; arithmetic wraps modulo 2^64. Source: splitmix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * _FIRST
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * _SECOND
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def uniforms(keys: Tensor, count: int) -> Tensor:
    """The first `count` uniform draws of every key (B,) int64: (B, count) float64 in [0, 1), 53 random bits each."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * STEP
    bits = mix(mix(keys).unsqueeze(1) + counter)
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed that is no signed number of 64 bits."""
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"seed: expected a number of 64 bits, got {seed}")


def sample_keys(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Keys (B,) int64 for the samples at places `index` (B,) of a data set, by the seed of the run and the epoch.

    Keys differ (but for chance 2^-64) for every (seed, epoch, index). ConfigError for a seed of more than 64 bits.
    """
    check_seed(seed)
    start = torch.tensor([seed, epoch], dtype=torch.int64)
    run = mix(mix(start[:1] + STEP) + start[1:] * STEP)
    return mix(run.to(index.device) ^ mix(index.to(torch.int64) * STEP))


def noise_seed(key: int, draw: int) -> int:
    """A 32-bit seed for the noise field number `draw` of the image with this key (CPU generators read 32 bits)."""
    return int(mix(mix(torch.tensor([key], dtype=torch.int64)) ^ (draw + 1)).item()) & 0xFFFFFFFF
