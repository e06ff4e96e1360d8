"""Room for the rows of a large output, in memory or in an unnamed file."""

from __future__ import annotations

import math
import mmap
import os
import tempfile

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor


class Canvas:
    """An array of zeros that is filled part by part.

    Args:
        shape: of the array.
        dtype: of its elements, as numpy names it.
        folder: where an unnamed file holds the values, so that memory does not grow with the image; the system deletes
            the file with the last reference to its values. Default: memory.

    Attributes:
        values: the array; its elements can be read and assigned at any time.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: DTypeLike = np.float32, *, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self._map: mmap.mmap | None = None
        if folder is None or 0 in shape:
            self.values = np.zeros(shape, dtype)
            return
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with tempfile.TemporaryFile(prefix=".morsr-", suffix=".canvas", dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and later a crash
            else:
                file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self.values = np.frombuffer(self._map, dtype).reshape(shape)

    @property
    def tensor(self) -> Tensor:
        """The values as a tensor that shares their memory."""
        return torch.from_numpy(self.values)

    def release(self) -> None:
        """Write changes to the file and give its pages back; values are read again when they are asked for.

        Without it the pages count as memory of this process until the system runs short.
        """
        if self._map is not None:
            self._map.flush()
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)
