"""Pictures: hidden pixels have no effect, gray stays gray, and everything comes back in its own kind."""

from dataclasses import replace
from io import BytesIO

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image
from torch.testing import assert_close

from morsr.imaging import read, read_rgb

KINDS = st.sampled_from([np.uint8, np.uint16, np.float32, np.float64, ">u2"])


@given(kind=KINDS, shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4)), data=st.data())
def test_arrays_come_back_as_they_were(kind, shape, data):
    shape = shape if shape[2] else shape[:2]
    top = 1.0 if np.dtype(kind).kind == "f" else float(np.iinfo(kind).max)
    values = data.draw(arrays.arrays(np.float32, shape, elements=st.floats(0.125, 1, width=32)))
    array = (values * top).astype(kind)
    picture = read(array)
    assert picture.rgb.shape == (1, 3, *shape[:2])
    assert picture.rgb.dtype == torch.float32
    back = replace(picture, samples=picture.encoded(picture.rgb, picture.alpha_plane)).like(array)
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    # Gray comes back through its luma, whose weights sum to 1.
    np.testing.assert_allclose(back.astype(float), array.astype(float), atol=1 if top > 1 else 1e-6)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "F"]
)
def test_pil_images_come_back_as_pil_images(mode):
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(colours.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(colours.convert("L")).astype(np.float32) / 255)
    else:
        image = colours.convert("RGBA").convert(mode) if mode == "PA" else colours.convert(mode)
    picture = read(image)
    back = replace(picture, samples=picture.encoded(picture.rgb, picture.alpha_plane)).like(image)
    expected = {"1": "L", "P": "RGB", "PA": "RGBA", "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
    assert back.mode == expected.get(mode, mode)
    assert back.size == image.size
    wanted = np.asarray(image if image.mode == back.mode else image.convert(back.mode)).astype(float)
    assert np.abs(np.asarray(back).astype(float) - wanted).max() <= 1


def test_notes_of_a_pil_image_stay_and_claim_no_rotation():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    file = BytesIO()
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif, dpi=(200, 200), icc_profile=b"profile")
    picture = read(Image.open(file))
    back = picture.like(None)
    assert picture.size == (8, 4)
    assert (back.size, back.info["dpi"], back.info["icc_profile"]) == ((4, 8), (200, 200), b"profile")
    assert (back.getexif().get(0x0112, 1), back.getexif()[0x010F]) == (1, "Maker")


def disc(hidden: tuple[int, int, int], soft: bool = False) -> np.ndarray:
    """A red disc on transparent ground of some hidden colour, RGBA."""
    y, x = np.mgrid[:32, :32] - 15.5
    inside = np.clip(10 - np.hypot(y, x), 0, 1) if soft else (np.hypot(y, x) < 10).astype(float)
    image = np.empty((32, 32, 4), np.uint8)
    image[..., 3] = np.rint(255 * inside)
    image[..., :3] = np.where(image[..., 3:] > 0, (220, 30, 20), hidden)
    return image


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["array", "16 bits", "floats", "pil", "png", "webp", "tif", "gif", "palette", "gray"])
def test_hidden_colours_have_no_effect(kind, soft):
    seen = []
    for hidden in ((0, 0, 0), (255, 255, 255), (0, 255, 0)):
        image = disc(hidden, soft and kind not in ("gif", "palette"))
        if kind == "array":
            picture = read(image)
        elif kind == "16 bits":
            picture = read(image.astype(np.uint16) * 257)
        elif kind == "floats":
            picture = read(image / np.float32(255))
        elif kind == "gray":
            picture = read(np.ascontiguousarray(image[..., [1, 3]]))
        elif kind == "pil":
            picture = read(Image.fromarray(image))
        elif kind in ("gif", "palette"):
            indices = (image[..., 3] > 0).astype(np.uint8)
            pil = Image.frombytes("P", (32, 32), indices.tobytes())
            pil.putpalette([*hidden, 220, 30, 20])
            pil.save(name := "in.gif" if kind == "gif" else "in.png", transparency=0)
            assert (read_rgb(name) == (220, 30, 20)).all()
            picture = read(name)
        else:
            Image.fromarray(image).save(f"in.{kind}", lossless=True, exact=True)
            picture = read(f"in.{kind}")
        assert picture.alpha is not None
        assert len(np.unique(picture.pixels.reshape(-1, picture.pixels.shape[2]), axis=0)) == 1, "one colour everywhere"
        seen.append(picture.rgb)
    assert_close(seen[0], seen[1], atol=0, rtol=0)
    assert_close(seen[0], seen[2], atol=0, rtol=0)


def test_a_hidden_pixel_takes_the_colour_of_the_nearest_visible_one():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 24, 4), np.uint8)
    image[..., 3] = rng.random((20, 24)) < 0.05
    filled, places = read(image).pixels, np.argwhere(image[..., 3])
    np.testing.assert_array_equal(filled[image[..., 3] > 0], image[..., :3][image[..., 3] > 0])
    for y, x in np.argwhere(image[..., 3] == 0):
        distances = np.hypot(*(places - (y, x)).T)
        colours = image[tuple(places[distances <= distances.min() * 1.05 + 1e-6].T)][..., :3]  # up to a rounding
        assert (filled[y, x] == colours).all(axis=-1).any()
    image[..., 3] = 0
    np.testing.assert_array_equal(read(image).pixels, image[..., :3], "nothing to take a colour from")
