"""Files: what is written is read back, as far as the format can hold it, by this package and by others alike."""

import os
import resource
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from morsr.errors import InputError
from morsr.imaging import Canvas, read, read_rgb, write
from morsr.imaging.files import check_output, file_format

FORMATS = {
    # name: largest error of 8 bits, has alpha, has 16 bits
    "png": (0, True, True),
    "tif": (0, True, True),
    "webp": (0, True, False),  # lossless here
    "bmp": (0, False, False),
    "jpg": (6, False, False),
    "gif": (8, True, False),
}
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(channels: int, dtype: type = np.uint8, size: tuple[int, int] = (24, 33)) -> np.ndarray:
    """A picture without noise, (H, W, C); alpha is 0 or full."""
    y, x = np.mgrid[: size[0], : size[1]]
    planes = np.stack([0.5 + 0.45 * np.sin(x / 25 + phase) * np.cos(y / 19 - phase) for phase in range(channels)], -1)
    if channels in (2, 4):
        planes[..., -1] = x > 8
    top = 1 if dtype is np.float32 else np.iinfo(dtype).max
    return planes.astype(dtype) if top == 1 else np.rint(planes * top).astype(dtype)


def eight(samples: np.ndarray) -> np.ndarray:
    """Samples of any depth as floats from 0 to 255."""
    return samples * (255.0 if samples.dtype.kind == "f" else 255.0 / np.iinfo(samples.dtype).max)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_what_is_written_is_read_back(suffix, channels, dtype):
    error, has_alpha, is_deep = FORMATS[suffix]
    picture = replace(read(smooth(channels, dtype)), format="WEBP")  # which was lossless
    name = f"out.{suffix}"
    if picture.alpha is not None and not has_alpha:
        with pytest.raises(InputError, match="no transparency"):
            write(picture, name)
        assert not list(Path().iterdir())
        return
    write(picture, name)
    back = read(name)
    assert back.size == picture.size
    assert back.transparent == picture.transparent
    exact = back.samples.dtype == dtype
    assert exact == (dtype is np.uint8 or (is_deep and dtype is np.uint16) or (suffix == "tif"))
    tolerance = error + (0 if exact else 0.51)
    assert np.abs(eight(back.pixels) - eight(picture.pixels)).max() <= tolerance
    if picture.alpha is not None:
        np.testing.assert_allclose(eight(back.alpha), eight(picture.alpha), atol=tolerance)
    if suffix != "tif" or (dtype is not np.float32 and channels != 2):  # rarer layouts, which Pillow does not know
        colours = read_rgb(name)
        assert colours.dtype == np.uint8
        assert np.abs(colours - eight(picture.pixels)).max() <= error + 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_stand_upright(suffix, orientation):
    upright = smooth(3)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1], 7: upright[::-1, ::-1].swapaxes(0, 1), 8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{orientation}"/>'.encode()
    options = {"tif": {}, "png": {}}.get(suffix, {"xmp": xmp})
    name = f"in.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(name, exif=exif, lossless=True, quality=95, **options)
    tolerance = 12 if suffix == "jpg" else 0
    for colours in (read(name).pixels, read_rgb(name), read(Image.open(name)).pixels):
        assert np.abs(colours.astype(int) - upright).max() <= tolerance
    write(read(name), f"out.{suffix}")
    with Image.open(f"out.{suffix}") as written:
        assert written.size == upright.shape[1::-1]
        assert written.getexif().get(0x0112, 1) == 1
        assert suffix == "tif" or written.getexif()[0x010F] == "Maker"
        assert b'Orientation="1"' in written.info.get("xmp", b'Orientation="1"')


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_notes_are_carried_over(suffix):
    image = Image.fromarray(smooth(3))
    image.save("in.jpg", icc_profile=PROFILE, dpi=(200, 200), xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>")
    write(read("in.jpg"), f"out.{suffix}")
    with Image.open(f"out.{suffix}") as written:
        assert written.info["icc_profile"] == PROFILE
        if suffix != "webp":
            np.testing.assert_allclose([float(value) for value in written.info["dpi"]], (200, 200), atol=0.1)
    assert read(f"out.{suffix}").notes["xmp-data"]


def test_texts_of_a_png_stay():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Title", "A hill")
    info.add_itxt("Author", "Somebody")
    Image.fromarray(smooth(3)).save("in.png", pnginfo=info)
    write(read("in.png"), "out.png")
    with Image.open("out.png") as written:
        assert (written.text["Title"], written.text["Author"]) == ("A hill", "Somebody")


def test_what_pillow_makes_of_other_modes():
    image = Image.fromarray(smooth(3))
    for mode, suffix, gray in (
        ("1", "png", True), ("1", "tif", True), ("P", "png", False), ("P", "gif", False), ("P", "bmp", False),
        ("CMYK", "jpg", False), ("CMYK", "tif", False), ("YCbCr", "jpg", False), ("L", "bmp", True),
    ):  # fmt: skip
        converted = image.convert(mode)
        converted.save(f"in.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
        expected = np.asarray(converted.convert("L" if gray else "RGB"), int)
        for picture in (read(f"in.{suffix}"), read(converted)):
            assert (picture.pixels.shape[2] == 1) == gray
            tolerance = 90 if mode == "CMYK" else 8 if suffix == "jpg" else 0  # CMYK goes by a profile
            assert np.abs(picture.pixels.squeeze().astype(int) - expected).mean() <= tolerance / 2, (mode, suffix)


@pytest.mark.parametrize("layout", ["associated", "tiled", "planes", "white is zero"])
def test_tiff_layouts_of_16_bits(layout):
    rgba = smooth(4, np.uint16)
    rgba[..., 3] = np.maximum(rgba[..., 3], 20000)
    samples, expected, options = {
        "associated": (
            np.dstack([np.rint(rgba[..., :3] * (rgba[..., 3:] / 65535)), rgba[..., 3]]).astype(np.uint16), rgba,
            {"photometric": "rgb", "extrasamples": ["assocalpha"]},
        ),
        "tiled": (rgba[..., :3], rgba[..., :3], {"photometric": "rgb", "tile": (16, 16), "bigtiff": True}),
        "planes": (
            np.moveaxis(rgba[..., :3], -1, 0).copy(), rgba[..., :3], {"photometric": "rgb", "planarconfig": "separate"},
        ),
        "white is zero": (65535 - rgba[..., 0], rgba[..., :1], {"photometric": "miniswhite"}),
    }[layout]  # fmt: skip
    tifffile.imwrite("in.tif", samples, **options)
    picture = read("in.tif")
    np.testing.assert_allclose(picture.samples.astype(int), expected, atol=3)


def jpeg(**options: object) -> bytes:
    Image.fromarray(smooth(3)).save("whole.jpg", **options)
    return Path("whole.jpg").read_bytes()


def frames(suffix: str) -> None:
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    images[0].save(f"bad.{suffix}", save_all=True, append_images=images[1:], loop=0)


BAD = {
    "nothing there": lambda: None,
    "empty": lambda: Path("bad.png").write_bytes(b""),
    "text": lambda: Path("bad.png").write_text("Dear Sir or Madam"),
    "a folder": lambda: Path("bad.png").mkdir(),
    "a pipe": lambda: os.mkfifo("bad.png"),
    "a device": lambda: Path("bad.png").symlink_to("/dev/zero"),
    "20 GB of something": lambda: os.truncate(os.open("bad.png", os.O_CREAT | os.O_RDWR), 20 * 2**30),
    "svg": lambda: Path("bad.png").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'),
    "eps": lambda: Path("bad.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n"),
    "half a jpeg": lambda: Path("bad.jpg").write_bytes(jpeg()[:600]),
    "animated gif": lambda: frames("gif"),
    "animated png": lambda: frames("png"),
    "animated webp": lambda: frames("webp"),
    "two pages": lambda: frames("tif"),
    "too many pixels": lambda: Path("bad.jpg").write_bytes(jpeg().replace(b"\0\x18\0\x21", b"\x4e\x20\x27\x10")),
    "32 bits": lambda: tifffile.imwrite("bad.tif", smooth(1, np.uint32), photometric="minisblack"),
    "values above 1": lambda: tifffile.imwrite("bad.tif", 2 * smooth(1, np.float32), photometric="minisblack"),
    "NaN": lambda: tifffile.imwrite("bad.tif", np.nan * smooth(1, np.float32), photometric="minisblack"),
}


@pytest.mark.parametrize("reader", [read, read_rgb])
@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_at_once(case, reader):
    BAD[case]()
    names = [path.name for path in Path().iterdir() if path.name.startswith("bad")] or ["bad.png"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        reader(names[0])
    message = str(caught.value)
    assert message.startswith(f"{names[0]}: ")
    assert len(message.splitlines()) == 1
    assert len(message) < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


@pytest.mark.parametrize(
    "source",
    [
        None, [1, 2], np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8),
        np.zeros((4, 4), np.int32), np.full((4, 4), 1.5), np.full((4, 4), np.nan), b"", "null\0.png",
        Image.new("I", (4, 4), -5),
    ],
    ids=lambda source: type(source).__name__,
)  # fmt: skip
def test_what_is_no_picture_is_refused(source):
    with pytest.raises(InputError) as caught:
        read(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [("out.docx", (8, 8)), ("out", (8, 8)), ("out.webp", (8, 16384)), ("out.jpg", (65501, 8))],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_work(name, size):
    with pytest.raises(InputError, match=name):
        check_output(read(smooth(3)), name, size)


def test_a_written_file_has_a_new_files_mode_and_any_name():
    folder = Path("a [b] %d")
    write(read(smooth(3)), folder / "c [n=2].png")
    Path("plain").touch()
    assert stat.S_IMODE((folder / "c [n=2].png").stat().st_mode) == stat.S_IMODE(Path("plain").stat().st_mode)
    np.testing.assert_array_equal(read(folder / "c [n=2].png").pixels, smooth(3))


@pytest.mark.skipif(sys.platform != "linux", reason="names of other systems are Unicode")
def test_a_folders_name_may_be_in_another_code():
    target = Path(os.fsdecode(b"caf\xe9"), "out.png")
    write(read(smooth(3)), target)
    np.testing.assert_array_equal(read(target).pixels, smooth(3))


def test_an_interrupt_during_a_write_ends_it():
    class Interrupting(Canvas):
        sent = False

        def release(self) -> None:
            if not self.sent:
                self.sent = True
                signal.raise_signal(signal.SIGINT)

    canvas = Interrupting((1024, 1024, 3), np.uint8)
    with pytest.raises(KeyboardInterrupt):
        write(replace(read(canvas.values), canvas=canvas), "out.png")
    assert not list(Path().iterdir())


def test_a_cmyk_image_has_the_colours_of_its_file():
    import pyvips

    image = pyvips.Image.new_from_array(smooth(3)).copy(interpretation="srgb").icc_export(output_profile="cmyk")
    image.tiffsave("in.tif")
    by_path, by_image = (read(source).pixels.astype(int) for source in ("in.tif", Image.open("in.tif")))
    assert np.abs(by_path - by_image).mean() < 3


def test_a_rewritten_file_gives_the_new_pixels():
    for level in (10, 200):
        write(read(np.full((8, 8, 3), level, np.uint8)), "same.png")
        assert read("same.png").pixels.max() == read_rgb("same.png").max() == level


def test_lossless_webp_stays_lossless():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
    image.save("in.webp", lossless=True, icc_profile=PROFILE)
    write(read("in.webp"), "out.webp")
    np.testing.assert_array_equal(read("out.webp").pixels, np.asarray(image))
    image.save("lossy.webp", quality=50)
    write(read("lossy.webp"), "small.webp")
    assert Path("small.webp").stat().st_size < Path("out.webp").stat().st_size


def test_a_photograph_with_the_scan_header_of_some_phones_is_read():
    (exif := Image.Exif())[274] = 6
    Image.fromarray(smooth(3)).save("in.jpg", quality=95, exif=exif)
    data = bytearray(Path("in.jpg").read_bytes())
    place = data.index(b"\xff\xda") + 5 + 2 * 3
    data[place : place + 3] = b"\0\0\0"  # a sequential JPEG has 0, 63, 0 here, and decoders do not care
    Path("odd.jpg").write_bytes(data)
    np.testing.assert_array_equal(read("odd.jpg").samples, read("in.jpg").samples)
    Path("cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError):
        read("cut.jpg")


def test_a_format_is_known_by_its_content_and_chosen_by_its_name():
    Image.fromarray(smooth(3)).save("in.png", "JPEG")
    assert read("in.png").format == "JPEG"
    assert file_format("a.JFIF") == "JPEG"


def test_forked_workers_read_and_never_hang():
    write(read(smooth(3)), "in.png")
    child = os.fork()
    if child == 0:
        try:
            read("in.png")
        except InputError:
            os._exit(0 if read_rgb("in.png").shape == (24, 33, 3) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
