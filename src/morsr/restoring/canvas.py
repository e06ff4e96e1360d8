"""Sums of tiles, in memory or in an unnamed file."""

from __future__ import annotations

import math
import mmap
import os
import tempfile

import torch
from torch import Tensor


class Canvas:
    """Zeros (B, C, H, W) that tiles are added to.

    Args:
        shape: of the values, float32.
        folder: where the unnamed file of the values is made; None keeps them in memory.
    """

    def __init__(self, shape: tuple[int, ...], folder: str | os.PathLike[str] | None = None) -> None:
        self._map: mmap.mmap | None = None
        if folder is None:
            self.values: Tensor = torch.zeros(shape)
            return
        with tempfile.TemporaryFile(prefix=".morsr-", dir=folder) as file:
            file.truncate(4 * math.prod(shape))
            self._map = mmap.mmap(file.fileno(), 0)
        self.values = torch.frombuffer(self._map, dtype=torch.float32).view(shape)

    def release(self) -> None:
        """Write what was changed to the file and let go of its memory; it is read again when it is looked at."""
        if self._map is not None:
            self._map.flush()
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
