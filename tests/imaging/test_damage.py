"""Damaged files: each is read or refused by an InputError of one line; nothing else, in bounded time and memory."""

import random
import resource
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from morsr.errors import InputError
from morsr.imaging import read, read_rgb, write

Y, X = np.mgrid[:96, :128]
SMOOTH = np.stack([127 + 120 * np.sin(X / 25 + k) * np.cos(Y / 19 - k) for k in range(4)], -1).astype(np.uint8)


def read_opened(path: Any) -> Any:
    """Read a PIL image that somebody has opened."""
    try:
        image = Image.open(path)
    except Exception as error:
        raise InputError("it cannot be opened") from error
    return read(image)


READERS: list[Callable[[Any], Any]] = [read, read_rgb, read_opened]


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def originals() -> dict[str, bytes]:
    """Files of all formats, modes and depths."""
    rgba, exif = Image.fromarray(SMOOTH), Image.Exif()
    rgb = rgba.convert("RGB")
    exif[0x0112], exif[0x010F] = 6, "Maker"
    files = [
        ("png", encoded(rgb, "PNG", exif=exif, dpi=(72, 72))), ("png", encoded(rgba, "PNG")),
        ("png", encoded(rgb.quantize(32), "PNG")), ("png", encoded(rgb.convert("1"), "PNG")),
        ("jpg", encoded(rgb, "JPEG", exif=exif)), ("jpg", encoded(rgb.convert("L"), "JPEG", progressive=True)),
        ("jpg", encoded(rgb.convert("CMYK"), "JPEG")), ("webp", encoded(rgb, "WEBP", exif=exif)),
        ("webp", encoded(rgba, "WEBP", lossless=True)), ("tif", encoded(rgb, "TIFF", tiffinfo={274: 3})),
        ("tif", encoded(rgba, "TIFF", compression="tiff_lzw")), ("bmp", encoded(rgb, "BMP")),
        ("gif", encoded(rgb.quantize(16), "GIF")),
    ]  # fmt: skip
    for suffix in ("png", "tif"):
        for channels in (1, 2, 3, 4):
            write(read(SMOOTH[..., :channels].astype(np.uint16) * 257), f"deep.{suffix}")
            files.append((suffix, Path(f"deep.{suffix}").read_bytes()))
    return {f"{index}.{suffix}": data for index, (suffix, data) in enumerate(files)}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One of the things that happen to files: flipped bytes, a cut, a hole, a repeat, zeros, a foreign part."""
    mutable = bytearray(data)
    start = rng.randrange(len(mutable))
    part = slice(start, start + rng.randrange(1, max(2, len(mutable) // 4)))
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            mutable[rng.randrange(len(mutable))] = rng.randrange(256)
    elif kind == 1:
        for _ in range(rng.randrange(1, 6)):  # headers are where decoders believe what they read
            mutable[rng.randrange(min(64, len(mutable)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif kind == 2:
        del mutable[start:]
    elif kind == 3:
        del mutable[part]
    elif kind == 4:
        mutable[start:start] = mutable[part]
    elif kind == 5:
        mutable[part] = bytes(len(mutable[part]))
    else:
        mutable[part] = rng.randbytes(len(mutable[part]))
    return bytes(mutable)


def attack(count: int, seed: int) -> dict[str, Any]:
    """Read mutated files in every way, and write again what could be read."""
    rng, read_again, slowest, files = random.Random(seed), 0, 0.0, originals()
    for name, data in files.items():
        Path(name).write_bytes(data)
        read(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(count):
        name = rng.choice(sorted(files))
        Path(name).write_bytes(mutated(files[name], rng))
        start = time.monotonic()
        for reader in READERS:
            said = ""
            try:
                found = reader(name)
                if reader is read:
                    write(found, f"out-{name}")
                    read_again += 1
            except InputError as error:
                said = str(error)
            except Exception as error:
                raise AssertionError(f"file {index} of seed {seed}, {name}: {error!r}") from error
            assert "\n" not in said, f"file {index} of seed {seed}: {said}"
        slowest = max(slowest, time.monotonic() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"read": read_again, "slowest": slowest, "grown": grown}


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_mutated_files_do_no_harm(count):
    found = attack(count, seed=1)
    assert 0 < found["read"] < count
    assert found["slowest"] < 5
    assert found["grown"] < 200 * 1024, "kilobytes"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("reader", [read, read_rgb])
def test_files_cut_short_are_refused(suffix, share, reader):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))
    noise.save(f"in.{suffix}")
    data = Path(f"in.{suffix}").read_bytes()
    Path(f"in.{suffix}").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError):
        reader(f"in.{suffix}")
