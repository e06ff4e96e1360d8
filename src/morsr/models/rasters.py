"""PNG and TIFF written row by row, with 8 or 16 bits per sample: what Pillow cannot write, and what fits no memory.

PNG: W3C Portable Network Graphics, third edition. TIFF: revision 6.0 with the deflate of TIFF Technical Note 2.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from morsr.errors import InputError

_PNG_COLOR = {1: 0, 2: 4, 3: 2, 4: 6}
_LEVEL = 5
_STRIP_BYTES = 1 << 18
_FILTER_ROWS = 16


class RowWriter(Protocol):
    """Takes an image's rows from the top; `finish` completes the file, which stays open."""

    def write(self, rows: NDArray[Any]) -> None: ...

    def finish(self) -> None: ...


class PNGWriter:
    """Write one PNG.

    Args:
        file: opened for binary writing.
        width, height: pixels.
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA.
        depth: 8 or 16 bits per sample.
        icc, exif: embedded as they are.
        text: keyword → text.
        dpi: dots per inch (x, y).
        chunks: further ancillary chunks, such as sRGB, name and content.
    """

    def __init__(
        self,
        file: IO[bytes],
        width: int,
        height: int,
        channels: int,
        *,
        depth: int = 8,
        icc: bytes | None = None,
        exif: bytes | None = None,
        text: Mapping[str, str] | None = None,
        dpi: tuple[float, float] | None = None,
        chunks: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self._file, self._height, self._row = file, height, 0
        self._shape, self._depth = (width, channels), depth
        self._bytes_per_pixel = channels * depth // 8
        self._last = np.zeros((1, width * self._bytes_per_pixel), dtype=np.uint8)
        self._deflate = zlib.compressobj(_LEVEL)
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, _PNG_COLOR[channels], 0, 0, 0))
        if icc:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
        for name, data in chunks:
            self._chunk(name, data)
        if dpi:
            self._chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in dpi), 1))
        if exif:
            self._chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
        for keyword, value in (text or {}).items():
            head = keyword.encode("latin-1", "replace")[:79] + b"\0\0\0\0\0"
            self._chunk(b"iTXt", head + value.encode("utf-8", "replace"))

    def write(self, rows: NDArray[Any]) -> None:
        """Add rows (n, width, channels) of uint8 or uint16, as the depth says."""
        _check_rows(rows, self._shape, self._depth)
        for start in range(0, rows.shape[0], _FILTER_ROWS):
            part = rows[start : start + _FILTER_ROWS]
            raw = part.astype(">u2" if self._depth == 16 else "u1").reshape(part.shape[0], -1).view(np.uint8)
            self._chunk(b"IDAT", self._deflate.compress(self._filtered(raw)))
            self._last = raw[-1:].copy()
        self._row += rows.shape[0]

    def _filtered(self, raw: NDArray[np.uint8]) -> bytes:
        """Each row by the filter that leaves the smallest sum of absolute differences, as the standard suggests."""
        up = np.concatenate([self._last, raw[:-1]])
        left, corner = np.zeros_like(raw), np.zeros_like(raw)
        step = self._bytes_per_pixel
        left[:, step:], corner[:, step:] = raw[:, :-step], up[:, :-step]
        a, b, c = (plane.astype(np.int16) for plane in (left, up, corner))
        to_left, to_up, to_corner = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
        paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
        kinds = (0, 1, 2, 4)
        differences = np.stack([raw, raw - left, raw - up, raw - paeth])
        cost = np.abs(differences.view(np.int8).astype(np.int16)).sum(axis=-1, dtype=np.int64)
        best = cost.argmin(axis=0)
        rows = np.empty((raw.shape[0], raw.shape[1] + 1), dtype=np.uint8)
        rows[:, 0] = np.array(kinds, dtype=np.uint8)[best]
        rows[:, 1:] = differences[best, np.arange(raw.shape[0])]
        return rows.tobytes()

    def finish(self) -> None:
        """Write the last data and the end mark."""
        _check_complete(self._row, self._height)
        self._chunk(b"IDAT", self._deflate.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, name: bytes, data: bytes) -> None:
        if name == b"IDAT" and not data:
            return
        self._file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


class TIFFWriter:
    """Write one little-endian TIFF of deflated strips with horizontal differencing; arguments as for `PNGWriter`.

    Raises:
        InputError: more than 4 GB, which the format cannot address.
    """

    def __init__(
        self,
        file: IO[bytes],
        width: int,
        height: int,
        channels: int,
        *,
        depth: int = 8,
        icc: bytes | None = None,
        dpi: tuple[float, float] | None = None,
        description: str | None = None,
    ) -> None:
        row_bytes = width * channels * depth // 8
        if row_bytes * height > 0xF0000000:
            raise InputError("a TIFF file holds 4 GB at most; write PNG instead")
        self._file, self._width, self._height, self._row = file, width, height, 0
        self._shape, self._depth, self._channels = (width, channels), depth, channels
        self._rows_per_strip = max(1, _STRIP_BYTES // row_bytes)
        self._waiting: list[NDArray[Any]] = []
        self._strips: list[tuple[int, int]] = []
        self._icc, self._dpi, self._description = icc, dpi, description
        file.write(b"II*\0\0\0\0\0")

    def write(self, rows: NDArray[Any]) -> None:
        """Add rows (n, width, channels) of uint8 or uint16, as the depth says."""
        _check_rows(rows, self._shape, self._depth)
        self._row += rows.shape[0]
        waiting = np.concatenate([*self._waiting, rows]) if self._waiting else rows
        whole = waiting.shape[0] // self._rows_per_strip * self._rows_per_strip
        for start in range(0, whole, self._rows_per_strip):
            self._strip(waiting[start : start + self._rows_per_strip])
        self._waiting = [waiting[whole:].copy()] if whole < waiting.shape[0] else []

    def _strip(self, rows: NDArray[Any]) -> None:
        differences = rows.copy()
        differences[:, 1:] -= rows[:, :-1]  # wraps around, as the format wants
        data = zlib.compress(differences.astype("<u2" if self._depth == 16 else "u1").tobytes(), _LEVEL)
        self._strips.append((self._file.tell(), len(data)))
        self._file.write(data)

    def finish(self) -> None:
        """Write the last strip and the directory."""
        _check_complete(self._row, self._height)
        for rows in self._waiting:
            self._strip(rows)
        channels = self._channels
        short, long, rational = ("H", 3), ("I", 4), ("II", 5)
        entries: list[tuple[int, tuple[str, int], list[int] | bytes]] = [
            (256, long, [self._width]),
            (257, long, [self._height]),
            (258, short, [self._depth] * channels),
            (259, short, [8]),
            (262, short, [2 if channels >= 3 else 1]),
            (273, long, [offset for offset, _ in self._strips]),
            (277, short, [channels]),
            (278, long, [self._rows_per_strip]),
            (279, long, [length for _, length in self._strips]),
            (284, short, [1]),
            (317, short, [2]),
            (339, short, [1] * channels),
        ]
        if self._description:
            entries.append((270, ("s", 2), self._description.encode("ascii", "replace") + b"\0"))
        if self._dpi:
            entries += [
                (tag, rational, [round(dpi * 1000), 1000]) for tag, dpi in zip((282, 283), self._dpi, strict=True)
            ]
            entries.append((296, short, [2]))
        if channels in (2, 4):
            entries.append((338, short, [2]))
        if self._icc:
            entries.append((34675, ("s", 7), self._icc))
        self._directory(sorted(entries, key=lambda entry: entry[0]))

    def _directory(self, entries: list[tuple[int, tuple[str, int], list[int] | bytes]]) -> None:
        start = self._file.tell() + self._file.tell() % 2
        extra_at = start + 2 + 12 * len(entries) + 4
        table, extra = struct.pack("<H", len(entries)), b""
        for tag, (code, kind), values in entries:
            data = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{code[0]}", *values)
            count = len(values) // len(code) if code != "s" else len(values)
            if len(data) <= 4:
                field = data.ljust(4, b"\0")
            else:
                field = struct.pack("<I", extra_at + len(extra))
                extra += data + b"\0" * (len(data) % 2)
            table += struct.pack("<HHI", tag, kind, count) + field
        self._file.write(b"\0" * (start - self._file.tell()) + table + b"\0\0\0\0" + extra)
        self._file.seek(4)
        self._file.write(struct.pack("<I", start))
        self._file.seek(0, 2)


def write_bmp_rgba(file: IO[bytes], samples: NDArray[np.uint8]) -> None:
    """Write a BMP with an alpha channel that its header declares, unlike Pillow's; samples (H, W, 4)."""
    height, width = samples.shape[:2]
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, samples.nbytes, 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    file.write(b"BM" + struct.pack("<IHHI", 122 + samples.nbytes, 0, 0, 122) + header)
    file.write(samples[::-1, :, [2, 1, 0, 3]].tobytes())


def _check_rows(rows: NDArray[Any], shape: tuple[int, int], depth: int) -> None:
    kind = np.uint16 if depth == 16 else np.uint8
    if rows.ndim != 3 or rows.shape[1:] != shape or rows.dtype != kind:
        raise InputError(f"rows: expected (n, {shape[0]}, {shape[1]}) {kind.__name__}, got {rows.shape} {rows.dtype}")


def _check_complete(row: int, height: int) -> None:
    if row != height:
        raise InputError(f"expected {height} rows, got {row}")
