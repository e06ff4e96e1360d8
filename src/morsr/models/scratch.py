"""A streamed image's input and unfinished rows, kept in files so that memory does not grow with the image."""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np
import torch
from torch import Tensor

from morsr.functional.tiling import Window


class FilePixels:
    """Tensors in an unnamed temporary file, read where they are looked at.

    Args:
        folder: where the files are made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder
        self._maps: list[mmap.mmap] = []

    def moved(self, tensor: Tensor) -> Tensor:
        """The same values, on the disk; the file goes when nothing refers to them any more.

        Raises:
            OSError: the disk is full.
        """
        with tempfile.TemporaryFile(prefix=".morsr-", suffix=".pixels", dir=self.folder) as file:
            file.write(tensor.contiguous().numpy().data.cast("B"))
            file.flush()
            self._maps.append(mmap.mmap(file.fileno(), 0))
        values = np.frombuffer(self._maps[-1], dtype=tensor.numpy().dtype)
        return torch.from_numpy(values).view(tensor.shape)

    def forget(self) -> None:
        """Let go of the memory of what was read so far; it is read again when it is looked at again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for part in self._maps:
                part.madvise(mmap.MADV_DONTNEED)


class FileRows:
    """A `RowBuffer` of one image in an unnamed temporary file; explicit reads and writes, no memory mapping.

    Args:
        width: of the image in pixels.
        rows: most rows that are kept at once, the height of a tile.
        channels: planes of the image.
        folder: where the file is made; it takes 4 · rows · channels · width bytes.
        device: of the rows that are given out.
    """

    def __init__(
        self, width: int, rows: int, *, folder: str | os.PathLike[str], device: torch.device, channels: int = 3
    ) -> None:
        self._width, self._rows, self._channels, self._device = width, rows, channels, device
        self._written = 0  # rows that hold sums; what lies below is new
        self._file = tempfile.TemporaryFile(prefix=".morsr-", suffix=".rows", dir=folder)  # noqa: SIM115

    def add(self, window: Window, values: Tensor) -> None:
        planes = values[0].cpu().permute(1, 0, 2).contiguous().numpy()  # (h, C, w)
        for index, row in enumerate(planes):
            place = window.top + index
            if place >= self._written:
                self._clear(place)
                self._written = place + 1
            for channel, added in enumerate(row):
                start = self._offset(place, channel, window.left)
                self._file.seek(start)
                there = np.frombuffer(self._file.read(added.nbytes), np.float32)
                self._file.seek(start)
                self._file.write((there + added).tobytes())

    def take(self, top: int, rows: int) -> Tensor:
        result = np.empty((self._channels, rows, self._width), np.float32)
        for index in range(rows):
            self._file.seek(self._offset(top + index, 0, 0))
            row = np.frombuffer(self._file.read(4 * self._channels * self._width), np.float32)
            result[:, index] = row.reshape(self._channels, self._width)
        return torch.from_numpy(result)[None].to(self._device)

    def close(self) -> None:
        """Give the file's space back."""
        self._file.close()

    def _offset(self, row: int, channel: int, column: int) -> int:
        return 4 * ((row % self._rows * self._channels + channel) * self._width + column)

    def _clear(self, row: int) -> None:
        self._file.seek(self._offset(row, 0, 0))
        self._file.write(bytes(4 * self._channels * self._width))
