"""TIFF files of the rarer layouts: their samples are read as they are meant, or the file is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from morsr.data.images import load_image
from morsr.errors import InputError
from morsr.models.picture import read_picture
from morsr.models.picture_files import header_size, read_file, write_picture

RNG = np.random.default_rng(0)
WIDTH, HEIGHT, BITS, PHOTOMETRIC, STRIPS, CHANNELS, ROWS, BYTES, PLANAR, EXTRA = (
    256, 257, 258, 262, 273, 277, 278, 279, 284, 338,
)  # fmt: skip


def write_tiff(path: str, strips: list[bytes], tags: dict[int, tuple[int, ...]]) -> Path:
    """A little-endian TIFF without compression, with any tags."""
    tags = tags | {BYTES: tuple(map(len, strips))}
    start, places = 8, []
    for strip in strips:
        places.append(start)
        start += len(strip)
    tags[STRIPS] = tuple(places)
    tail = start + 2 + 12 * len(tags) + 4
    directory, values = struct.pack("<H", len(tags)), b""
    for tag, numbers in sorted(tags.items()):
        data = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            data, values = struct.pack("<I", tail + len(values)), values + data
        directory += struct.pack("<HHI", tag, 4, len(numbers)) + data
    Path(path).write_bytes(b"II*\0" + struct.pack("<I", start) + b"".join(strips) + directory + bytes(4) + values)
    return Path(path)


def layout(size: tuple[int, int], channels: int, **more: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """The tags of 16-bit samples; `more` by the names above."""
    tags = {WIDTH: (size[0],), HEIGHT: (size[1],), BITS: (16,) * channels, CHANNELS: (channels,), ROWS: (size[1],)}
    return tags | {PHOTOMETRIC: (2 if channels > 2 else 1,)} | {globals()[name]: value for name, value in more.items()}


def deep(channels: int) -> np.ndarray:
    return RNG.integers(0, 65536, (8, 12, channels)).astype("<u2")


def test_16_bit_gray_whose_white_is_zero_is_turned_round():
    samples = deep(1)
    path = write_tiff("white.tif", [(65535 - samples).tobytes()], layout((12, 8), 1, PHOTOMETRIC=(0,)))
    expected = samples[..., 0]
    np.testing.assert_array_equal(read_file(path, compact=True).rgb[0, 0], expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal((read_picture(image).rgb[0, 0] * 65535).round(), expected)
    np.testing.assert_array_equal(load_image(path)[..., 0], np.rint(expected / 257))
    write_picture(read_file(path), "out.tif")
    np.testing.assert_array_equal(read_file("out.tif", compact=True).rgb[0, 0], expected)


def test_12_bits_fill_the_range():
    samples = np.array([[0, 1, 2048, 4095]])
    bits = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(1, 4, 2), axis=-1)[..., 4:].reshape(1, -1)
    path = write_tiff("twelve.tif", [np.packbits(bits).tobytes()], layout((4, 1), 1, BITS=(12,)))
    np.testing.assert_array_equal(read_file(path, compact=True).rgb[0, 0], [[0, 16, 32776, 65535]])
    np.testing.assert_array_equal(load_image(path)[..., 0], [[0, 0, 128, 255]])


def test_16_bit_colours_are_freed_of_alpha_where_they_carry_it():
    straight = deep(4)
    straight[..., 3] |= 0x8000  # of less alpha fewer bits of the colours are left
    straight[0, :3, 3] = (65535, 65535, 0)
    factor = straight[..., 3:] / 65535
    carried = np.concatenate([np.rint(straight[..., :3] * factor), straight[..., 3:]], axis=2).astype("<u2")
    for extra, stored in ((1, carried), (2, straight)):
        path = write_tiff("alpha.tif", [stored.tobytes()], layout((12, 8), 4, EXTRA=(extra,)))
        picture = read_file(path, compact=True)
        np.testing.assert_array_equal(picture.alpha[0, 0], straight[..., 3])
        found = picture.rgb[0].permute(1, 2, 0).numpy().astype(int)
        seen = straight[..., 3] > 0
        assert np.abs(found - straight[..., :3])[seen].max() <= (1 if extra == 1 else 0)
    write_picture(picture.expanded(), "out.tif")
    np.testing.assert_array_equal(read_file("out.tif", compact=True).rgb, picture.rgb)


def test_16_bit_planes_are_refused():
    planes = [deep(1).tobytes() for _ in range(3)]
    path = write_tiff("planes.tif", planes, layout((12, 8), 3, PLANAR=(2,)))
    with pytest.raises(InputError, match=r"planes\.tif: 16-bit colours in separate planes are not supported"):
        read_file(path)
    path = write_tiff("plain.tif", [deep(3).tobytes()], layout((12, 8), 3, PLANAR=(1,)))
    assert read_file(path).form.depth == 16


def test_floating_point_gray_goes_in_and_out():
    samples = RNG.random((8, 12), dtype=np.float32)
    Image.fromarray(samples).save("float.tif")
    picture = read_file("float.tif")
    assert (picture.form.mode, picture.form.depth) == ("L", 32)
    np.testing.assert_array_equal(picture.rgb[0, 1], samples)
    write_picture(picture, "out.tif")
    with Image.open("out.tif") as written:
        assert written.mode == "F"
    np.testing.assert_allclose(read_file("out.tif").rgb[0, 2], samples, atol=1e-6)
    Image.fromarray(samples * 255).save("range.tif")
    with pytest.raises(InputError, match=r"range.tif: picture: expected finite values in \[0, 1\]"):
        read_file("range.tif")


def test_a_header_without_its_size_is_an_input_error():
    tags = layout((12, 8), 2, EXTRA=(2,))
    whole = write_tiff("whole.tif", [deep(2).tobytes()], tags)
    assert header_size(whole) == (8, 12)
    write_tiff("none.tif", [deep(2).tobytes()], {tag: value for tag, value in tags.items() if tag != WIDTH})
    for read in (header_size, read_file):
        with pytest.raises(InputError, match=r"none\.tif"):
            read(Path("none.tif"))
