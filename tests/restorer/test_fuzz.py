"""Mutated image files: each is either read or refused by an InputError of one line; nothing else, and nothing hangs."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from morsr.errors import InputError
from morsr.models.picture import Form, from_samples
from morsr.models.picture_files import read_file, write_picture


def originals() -> dict[str, bytes]:
    """Small files of all formats, modes and depths."""
    y, x = np.mgrid[:24, :32]
    planes = np.stack([127 + 120 * np.sin(x / 5 + phase) * np.cos(y / 4 - phase) for phase in range(4)], axis=-1)
    samples = planes.round().astype(np.uint8)
    rgba = Image.fromarray(samples)
    rgb = rgba.convert("RGB")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    files = {}
    for suffix, image, options in (
        ("png", rgb, {"exif": exif}),
        ("png", rgba, {}),
        ("png", rgb.quantize(32), {}),
        ("png", rgb.convert("L"), {}),
        ("png", rgb.convert("1"), {}),
        ("jpg", rgb, {"exif": exif}),
        ("jpg", rgb.convert("L"), {"progressive": True}),
        ("jpg", rgb.convert("CMYK"), {}),
        ("webp", rgb, {"exif": exif}),
        ("webp", rgba, {"lossless": True}),
        ("tif", rgb, {"tiffinfo": {274: 3}}),
        ("tif", rgba, {"compression": "tiff_lzw"}),
        ("bmp", rgb, {}),
        ("gif", rgb.quantize(16), {}),
    ):
        buffer = BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
        image.save(buffer, kind, **options)
        files[f"{len(files)}.{suffix}"] = buffer.getvalue()
    for suffix in ("png", "tif"):
        for mode, channels in (("L", 1), ("RGB", 3), ("RGBA", 4)):
            deep = (samples[..., :channels].astype(np.uint16) * 257).copy()
            write_picture(from_samples(deep, Form(kind="file", mode=mode, depth=16)), f"deep.{suffix}")
            files[f"{len(files)}.{suffix}"] = Path(f"deep.{suffix}").read_bytes()
    return files


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One of the things that happen to files: flipped bytes, a cut, a hole, a repeat, zeros, a foreign part."""
    mutable = bytearray(data)
    start = rng.randrange(len(mutable))
    length = rng.randrange(1, max(2, len(mutable) // 4))
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            mutable[rng.randrange(len(mutable))] = rng.randrange(256)
    elif kind == 1:
        # Headers are where decoders believe what they read.
        for _ in range(rng.randrange(1, 6)):
            mutable[rng.randrange(min(64, len(mutable)))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif kind == 2:
        del mutable[start:]
    elif kind == 3:
        del mutable[start : start + length]
    elif kind == 4:
        mutable[start:start] = mutable[start : start + length]
    elif kind == 5:
        mutable[start : start + length] = bytes(len(mutable[start : start + length]))
    else:
        mutable[start : start + length] = rng.randbytes(length)
    return bytes(mutable)


def fuzz(count: int, seed: int, *, write: bool) -> tuple[int, int]:
    """Read `count` mutated files, and write again what could be read; (read, refused)."""
    rng, read = random.Random(seed), 0
    files = originals()
    for index in range(count):
        name = rng.choice(sorted(files))
        Path(name).write_bytes(mutated(files[name], rng))
        try:
            picture = read_file(name, max_pixels=1_000_000)
            if write:
                write_picture(picture, f"out-{name}")
        except InputError as error:
            message = str(error)
            assert name in message, f"file {index} of seed {seed}: {message}"
            assert "\n" not in message, f"file {index} of seed {seed}: {message!r}"
            continue
        assert torch.isfinite(picture.rgb).all(), f"file {index} of seed {seed}"
        assert 0 <= picture.rgb.min() <= picture.rgb.max() <= 1, f"file {index} of seed {seed}"
        read += 1
    left = [path.name for path in Path().iterdir() if path.name.startswith(".")]
    assert not left, f"half-written outputs: {left}"
    return read, count - read


def test_whole_files_are_read():
    for name, data in originals().items():
        Path(name).write_bytes(data)
        assert read_file(name).size in {(24, 32), (32, 24)}


def test_300_mutated_files():
    read, refused = fuzz(300, seed=1, write=True)
    assert read > 20, "mutations are too harsh to test what lies behind the header"
    assert refused > 60, "mutations are too mild"


@pytest.mark.slow
def test_3000_mutated_files():
    read, refused = fuzz(3000, seed=2, write=True)
    assert read > 200
    assert refused > 600


@pytest.mark.slow
def test_the_odd_images_mutated(shared_data: Path):
    rng = random.Random(3)
    for path in sorted((shared_data / "odd_images").iterdir()):
        for _ in range(30):
            Path(path.name).write_bytes(mutated(path.read_bytes(), rng))
            try:
                picture = read_file(path.name)
            except InputError:
                continue
            assert torch.isfinite(picture.rgb).all()
