"""Pictures in memory: every kind and mode goes in and comes back as it was."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.testing import assert_close

from morsr.errors import InputError
from morsr.models.picture import inverse_orientation, orient, read_picture, resized_exif, to_planes

RNG = np.random.default_rng(0)


def photo(mode: str = "RGB", size: tuple[int, int] = (20, 14)) -> Image.Image:
    """A smooth image of a mode."""
    y, x = np.mgrid[: size[1], : size[0]]
    planes = [127 + 120 * np.sin(x / 5 + phase) * np.cos(y / 4 - phase) for phase in range(4)]
    array = np.stack(planes, axis=-1).round().astype(np.uint8)
    if mode in ("1", "L", "P"):
        return Image.fromarray(array[..., 0]).convert(mode)
    if mode == "CMYK":
        return Image.frombytes("CMYK", size, array.tobytes())
    channels = {"LA": 2, "RGB": 3, "RGBA": 4, "YCbCr": 3, "HSV": 3}[mode]
    image = Image.fromarray(array[..., :channels])
    return image.convert(mode) if image.mode != mode else image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pil_images_come_back_in_their_mode(mode: str):
    image = photo(mode)
    picture = read_picture(image)
    back = picture.to_kind()
    assert (back.mode, back.size) == (mode, image.size)
    tolerance = {"HSV": 12, "YCbCr": 4, "P": 0}.get(mode, 0)
    for color_mode in ("RGBA" if mode in ("LA", "RGBA") else "RGB",):
        difference = np.abs(np.asarray(back.convert(color_mode), int) - np.asarray(image.convert(color_mode), int))
        assert difference.max() <= tolerance


def test_gray_values_of_16_and_32_bits_come_back():
    deep = RNG.integers(0, 65536, (9, 7)).astype(np.uint16)
    back = read_picture(Image.fromarray(deep)).to_kind()
    assert back.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(back), deep)
    floats = RNG.random((9, 7), dtype=np.float32)
    back = read_picture(Image.fromarray(floats)).to_kind()
    assert back.mode == "F"
    np.testing.assert_allclose(np.asarray(back), floats, atol=1e-6)
    integers = read_picture(Image.fromarray(deep.astype(np.int32)))
    assert integers.form.depth == 16


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", "<u2", np.float32, ">f4", np.float64, np.float16])
@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 1), (5, 8, 2), (5, 8, 3), (5, 8, 4)])
def test_arrays_come_back_in_shape_and_dtype(dtype: type | str, shape: tuple[int, ...]):
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    array = (RNG.random(shape) * top).astype(dtype)
    back = read_picture(array).to_kind()
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    np.testing.assert_allclose(back.astype(float), array.astype(float), atol=1e-3 if top == 1 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensors_come_back_in_dtype(dtype: torch.dtype):
    images = torch.rand(2, 3, 4, 5).to(dtype)
    back = read_picture(images).to_kind()
    assert back.dtype == dtype
    assert_close(back, images)


def test_alpha_lies_beside_the_colours():
    array = RNG.integers(0, 256, (6, 7, 4)).astype(np.uint8)
    picture = read_picture(array)
    assert picture.alpha is not None
    assert_close(picture.alpha[0, 0], torch.from_numpy(array[..., 3]).float() / 255)
    assert_close(picture.rgb[0].permute(1, 2, 0), torch.from_numpy(array[..., :3]).float() / 255)


def test_black_gives_way_to_light_and_other_plates_follow():
    """Restored pixels brighter than their black plate allows still print as they should."""
    picture = read_picture(photo("CMYK"))
    brighter = (picture.rgb + 0.3).clamp(0, 1)
    planes = to_planes(picture.replaced(brighter, None, picture.black))
    assert planes.shape[1] == 4
    assert 0 <= planes.min() <= planes.max() <= 1
    assert_close((1 - planes[:, :3]) * (1 - planes[:, 3:]), brighter, atol=1e-4, rtol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_palettes_with_transparency_stay_palettes(soft: bool):
    image = photo("RGBA", (40, 30))
    alpha = Image.linear_gradient("L").resize(image.size)
    image.putalpha(alpha if soft else alpha.point(lambda value: 255 * (value > 100)))
    palette = image.quantize(64, method=Image.Quantize.FASTOCTREE)
    file = BytesIO()
    palette.save(file, "PNG")
    opened = Image.open(file)
    assert opened.mode == "P"
    back = read_picture(opened).to_kind()
    assert back.mode == "P"
    before, after = (np.asarray(i.convert("RGBA"), int) for i in (opened, back))
    assert np.abs(before[..., 3] - after[..., 3]).max() <= (40 if soft else 0)
    seen = before[..., 3] > 0
    assert np.abs(before[seen] - after[seen]).mean() < 6


def test_a_palette_of_rgba_has_its_transparency():
    image = photo("RGBA", (40, 30))
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    palette = image.quantize(64, method=Image.Quantize.FASTOCTREE)
    assert "transparency" not in palette.info
    alpha = read_picture(palette).alpha
    assert alpha is not None
    expected = np.asarray(palette.convert("RGBA"))[..., 3].astype(np.float32) / 255
    assert_close(alpha[0, 0], torch.from_numpy(expected))
    image.putalpha(255)
    assert read_picture(image.quantize(64, method=Image.Quantize.FASTOCTREE)).form.mode == "P"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_and_go_back_turned(orientation: int):
    stored = photo()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    exif.get_ifd(0x8769)[0xA002], exif.get_ifd(0x8769)[0xA003] = 20, 14
    file = BytesIO()
    stored.save(file, "PNG", exif=exif)
    opened = Image.open(file)
    picture = read_picture(opened)
    upright = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal((picture.rgb[0].permute(1, 2, 0) * 255).round().numpy(), upright)
    back = picture.to_kind()
    assert back.getexif()[0x0112] == orientation
    np.testing.assert_array_equal(np.asarray(back), np.asarray(stored))
    turned = orient(picture.rgb, inverse_orientation(orientation))
    assert_close(orient(turned, orientation), picture.rgb)


def test_exif_says_the_new_size():
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0xA002], exif.get_ifd(0x8769)[0xA003] = 20, 14
    image = photo()
    image.info["exif"] = exif.tobytes()
    form = read_picture(image).form
    changed = Image.Exif()
    changed.load(resized_exif(form, (80, 56)) or b"")
    assert changed[0x010F] == "Maker"
    assert dict(changed.get_ifd(0x8769)) == {0xA002: 80, 0xA003: 56}


def frames() -> Image.Image:
    file = BytesIO()
    photo("L").save(file, "GIF", save_all=True, append_images=[photo("L").rotate(90)])
    return Image.open(file)


BAD = {
    "nan": (torch.full((1, 3, 4, 4), float("nan")), "finite"),
    "infinite": (torch.full((1, 3, 4, 4), float("inf")), "finite"),
    "range of 255": (torch.rand(1, 3, 4, 4) * 255, r"in \[0, 1\]"),
    "negative": (torch.rand(1, 3, 4, 4) - 1, r"in \[0, 1\]"),
    "uint8 tensor": (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "divide by 255"),
    "no batch": (torch.rand(3, 4, 4), r"\(B, C, H, W\)"),
    "gray tensor": (torch.rand(1, 1, 4, 4), "3 channels"),
    "no pixels": (torch.rand(1, 3, 0, 4), "at least one pixel"),
    "nan array": (np.full((4, 4, 3), np.nan), "finite"),
    "wide array": (np.random.rand(4, 4, 3) * 255, r"in \[0, 1\]"),
    "channels first": (np.zeros((3, 40, 40), np.uint8), "1 to 4 channels"),
    "one row": (np.zeros(5, np.uint8), "expected shape"),
    "integers": (np.zeros((4, 4, 3), np.int64), "uint8, uint16 or floats"),
    "empty array": (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
    "objects": (np.zeros((4, 4), object), "uint8, uint16 or floats"),
    "animated": (frames(), "2 frames"),
    "lab": (Image.new("LAB", (4, 4)), "LAB"),
    "empty pil": (Image.new("RGB", (0, 4)), "at least one pixel"),
    "deep integers": (Image.fromarray(np.array([[0, 70000]], np.int32)), "16 bits"),
    "wide floats": (Image.fromarray(np.array([[0, 255]], np.float32)), r"in \[0, 1\]"),
    "number": (3, "got int"),
    "nothing": (None, "got NoneType"),
    "no such file": ("missing.png", "No such file"),
    "folder": (".", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused_in_one_line(name: str):
    image, words = BAD[name]
    with pytest.raises(InputError, match=words) as caught:
        read_picture(image)
    assert "\n" not in str(caught.value)


def test_a_pil_image_cut_short_is_refused():
    file = BytesIO()
    photo("RGB", (200, 200)).save(file, "PNG")
    with pytest.raises(InputError, match="cannot be decoded"):
        read_picture(Image.open(BytesIO(file.getvalue()[: len(file.getvalue()) // 2])))
