"""Pictures in files: formats, depths, profiles and metadata are kept, bad files refused, none left half written."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch.testing import assert_close

from morsr.errors import InputError
from morsr.models.picture import Form, from_samples, read_picture, to_samples
from morsr.models.picture_files import atomic_file, header_size, read_file, write_picture
from morsr.models.rasters import PNGWriter, TIFFWriter, write_bmp_rgba

RNG = np.random.default_rng(0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def smooth(channels: int, size: tuple[int, int] = (33, 21), top: int = 255) -> np.ndarray:
    y, x = np.mgrid[: size[1], : size[0]]
    planes = [0.5 + 0.47 * np.sin(x / 7 + phase) * np.cos(y / 6 - phase) for phase in range(channels)]
    return (np.stack(planes, axis=-1) * top).round().astype(np.uint8 if top == 255 else np.uint16)


def saved(name: str, mode: str) -> Path:
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 3, "1": 1, "CMYK": 4}[mode]
    samples = smooth(channels)
    if mode == "CMYK":
        image = Image.frombytes("CMYK", samples.shape[1::-1], samples.tobytes())
    else:
        image = Image.fromarray(samples[..., 0] if channels == 1 else samples)
        image = image.quantize(64) if mode == "P" else image.convert(mode)
    if name.endswith("bmp") and mode == "RGBA":
        with open(name, "wb") as file:
            write_bmp_rgba(file, samples)
        return Path(name)
    image.save(name, **({"quality": 95} if name.endswith(("jpg", "webp")) else {}))
    return Path(name)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *(("png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("tif", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")),
        *(("bmp", mode) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *(("jpg", mode) for mode in ("L", "RGB", "CMYK")),
        *(("webp", mode) for mode in ("RGB", "RGBA")),
        ("gif", "P"),
    ],
)
def test_every_format_keeps_its_modes(suffix: str, mode: str):
    source = saved(f"in.{suffix}", mode)
    picture = read_file(source)
    assert picture.form.mode == mode
    write_picture(picture, f"out.{suffix}")
    before, after = Image.open(source), Image.open(f"out.{suffix}")
    assert (after.format, after.mode, after.size) == (before.format, before.mode, before.size)
    seen_as = "RGBA" if mode in ("LA", "RGBA") else mode if mode == "CMYK" else "RGB"
    difference = np.abs(np.asarray(before.convert(seen_as), int) - np.asarray(after.convert(seen_as), int))
    # Decoding and encoding JPEG and WebP anew costs a few values; all others are exact.
    limit = {"jpg": 16 if mode == "CMYK" else 6, "webp": 24}.get(suffix, 0)
    assert difference.max() <= limit


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_stay_16_bits(suffix: str, channels: int):
    samples = RNG.integers(0, 65536, (19, 23, channels)).astype(np.uint16)
    mode = ("L", "LA", "RGB", "RGBA")[channels - 1]
    write_picture(from_samples(samples, Form(kind="file", mode=mode, depth=16)), f"deep.{suffix}")
    decoded = cv2.imread(f"deep.{suffix}", cv2.IMREAD_UNCHANGED)
    if channels in (1, 3, 4):  # an independent decoder
        expected = samples if channels == 1 else samples[..., [2, 1, 0, 3][:channels]]
        np.testing.assert_array_equal(decoded.reshape(expected.shape), expected)
    picture = read_file(f"deep.{suffix}")
    assert (picture.form.depth, picture.form.mode) == (16, mode)
    write_picture(picture, f"again.{suffix}")
    assert_close(read_file(f"again.{suffix}").rgb, picture.rgb, atol=0, rtol=0)
    np.testing.assert_array_equal(to_samples(picture), samples)
    assert header_size(f"deep.{suffix}") == (19, 23)


def test_16_bit_gray_with_alpha_in_tiff_keeps_profile_and_resolution_and_is_checked():
    samples = RNG.integers(0, 65536, (300, 900, 2)).astype(np.uint16)  # of several strips
    form = Form(kind="file", mode="LA", depth=16, icc=SRGB, info={"dpi": (300, 150)})
    write_picture(from_samples(samples, form), "in.tif")
    picture = read_file("in.tif", compact=True)
    assert (picture.form.icc, picture.form.info) == (SRGB, {"dpi": (300, 150)})
    np.testing.assert_array_equal(picture.rgb[0, 0], samples[..., 0])
    np.testing.assert_array_equal(picture.alpha[0, 0], samples[..., 1])
    with pytest.raises(InputError, match="900 x 300 is more than 1,000 pixels"):
        read_file("in.tif", max_pixels=1000)
    data = Path("in.tif").read_bytes()
    other = data.replace(struct.pack("<HHI", 259, 3, 1) + b"\x08", struct.pack("<HHI", 259, 3, 1) + b"\x05")
    damaged = bytearray(data)
    damaged[10_000:10_100] = bytes(100)
    for content, words in ((other, "convert it to PNG"), (bytes(damaged), "damaged"), (data[:-20], "in.tif: ")):
        Path("in.tif").write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_file("in.tif")


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("writer", [PNGWriter, TIFFWriter])
@pytest.mark.parametrize("cuts", [[1], [5, 11, 3], [64, 1, 64]])
def test_rows_may_come_in_any_portions(writer: type, channels: int, depth: int, cuts: list[int]):
    samples = smooth(channels, (40, sum(cuts)), 255 if depth == 8 else 65535)
    with open("rows", "w+b") as file:
        rows = writer(file, 40, sum(cuts), channels, depth=depth, icc=SRGB if channels > 1 else None, dpi=(300, 300))
        for part in np.split(samples, np.cumsum(cuts)[:-1]):
            rows.write(part)
        rows.finish()
    image = Image.open("rows")
    image.load()
    assert image.info.get("icc_profile") == (SRGB if channels > 1 else None)
    assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    if depth == 8:
        np.testing.assert_array_equal(np.asarray(image).reshape(samples.shape), samples)
    else:
        decoded = cv2.imread("rows", cv2.IMREAD_UNCHANGED).reshape(samples.shape)
        np.testing.assert_array_equal(decoded, samples if channels == 1 else samples[..., [2, 1, 0, 3][:channels]])


def test_filters_make_a_smooth_image_small():
    samples = smooth(3, (512, 512))
    with open("small.png", "w+b") as file:
        writer = PNGWriter(file, 512, 512, 3)
        writer.write(samples)
        writer.finish()
    Image.fromarray(samples).save("pillow.png")
    assert os.path.getsize("small.png") < 1.05 * os.path.getsize("pillow.png")


def test_rows_that_are_missing_or_wrong_are_refused():
    with open("rows", "w+b") as file:
        writer = PNGWriter(file, 8, 4, 3)
        with pytest.raises(InputError, match="expected"):
            writer.write(np.zeros((1, 8, 4), np.uint8))
        writer.write(np.zeros((1, 8, 3), np.uint8))
        with pytest.raises(InputError, match="4 rows, got 1"):
            writer.finish()
        with pytest.raises(InputError, match="4 GB"):
            TIFFWriter(file, 100_000, 100_000, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_exif_icc_and_orientation_are_kept(suffix: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    Image.fromarray(smooth(3)).save(f"in.{suffix}", exif=exif, icc_profile=SRGB, quality=95, dpi=(72, 72))
    picture = read_file(f"in.{suffix}")
    write_picture(picture, f"out.{suffix}")
    after = Image.open(f"out.{suffix}")
    assert after.info["icc_profile"] == SRGB
    assert dict(after.getexif()) == dict(exif)
    before = ImageOps.exif_transpose(Image.open(f"in.{suffix}"))
    assert ImageOps.exif_transpose(after).size == before.size
    difference = np.asarray(ImageOps.exif_transpose(after), int) - np.asarray(before, int)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("profile", [None, SRGB], ids=["no profile", "profile"])
def test_webp_stays_lossless(profile: bytes | None, mode: str, lossless: bool):
    samples = RNG.integers(0, 256, (20, 30, len(mode))).astype(np.uint8)
    options = {"icc_profile": profile} if profile else {}
    Image.fromarray(samples).save("in.webp", lossless=lossless, exact=True, **options)
    picture = read_file("in.webp")
    assert picture.form.info["lossless"] is lossless
    write_picture(picture, "out.webp")
    assert (b"VP8L" in Path("out.webp").read_bytes()) is lossless


@pytest.mark.parametrize("suffix", ["bmp", "tif"])
def test_formats_without_exif_get_upright_pixels(suffix: str):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(3)).save("in.png", exif=exif)
    write_picture(read_file("in.png"), f"out.{suffix}")
    after = Image.open(f"out.{suffix}")
    assert after.getexif().get(0x0112, 1) == 1
    np.testing.assert_array_equal(np.asarray(after), np.asarray(ImageOps.exif_transpose(Image.open("in.png"))))


@pytest.mark.parametrize(
    "said", ['tiff:Orientation="6"/>', "><tiff:Orientation>6</tiff:Orientation></rdf:Description>"]
)
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "deep.png"])
def test_a_picture_that_xmp_turns_is_turned_once(suffix: str, said: str):
    xmp = f'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><rdf:Description {said}</x:xmpmeta>'
    words = PngInfo()
    words.add_itxt("XML:com.adobe.xmp", xmp)
    options = {"pnginfo": words} if suffix.endswith("png") else {"xmp": xmp.encode()}
    Image.fromarray(smooth(3)).save(f"in.{suffix}", quality=95, **options)
    picture = read_file(f"in.{suffix}")
    assert picture.size == (33, 21), "21 x 33 once it stands upright"
    if suffix == "deep.png":
        picture = picture.with_form(replace(picture.form, depth=16))
    write_picture(picture, f"out.{suffix}")
    again = read_file(f"out.{suffix}")
    assert again.size == picture.size
    kept = again.form.info["XML:com.adobe.xmp"] if suffix.endswith("png") else again.form.info["xmp"].decode()
    assert kept == xmp.replace("6", "1")
    assert float((again.rgb - picture.rgb).abs().mean()) < 0.02


@pytest.mark.parametrize("orientation", [1, 6])
def test_exif_as_text_of_a_png_does_not_turn_it_twice(orientation: int):
    exif, words = Image.Exif(), PngInfo()
    exif[274], exif[305] = orientation, "a program"
    data = exif.tobytes()
    words.add_text("Raw profile type exif", f"\nexif\n{len(data):8d}\n{data.hex()}\n")
    Image.fromarray(smooth(3)).save("in.png", pnginfo=words)
    picture = read_file("in.png")
    assert picture.size == ((33, 21) if orientation == 6 else (21, 33))
    write_picture(picture, "out.png")
    again = read_file("out.png")
    assert_close(again.rgb, picture.rgb, atol=0, rtol=0)
    assert ("Raw profile type exif" in again.form.info) == (orientation == 1)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_turned_tiff_is_read_upright(orientation: int, deep: bool):
    samples = smooth(3, top=65535 if deep else 255)
    if deep:
        write_picture(from_samples(samples, Form(kind="file", depth=16)), "in.tif")
        data = bytearray(Path("in.tif").read_bytes())
        # 284, PlanarConfiguration 1, is the default and can be given up for 274, Orientation.
        at = data.rindex(struct.pack("<HHI", 284, 3, 1))
        data[at : at + 12] = struct.pack("<HHIHH", 274, 3, 1, orientation, 0)
        Path("in.tif").write_bytes(bytes(data))
    else:
        Image.fromarray(samples).save("in.tif", tiffinfo={274: orientation})
    picture = read_file("in.tif")
    write_picture(picture, "out.tif")
    again = read_file("out.tif")
    assert_close(again.rgb, picture.rgb, atol=0, rtol=0)
    wanted = np.rot90(samples, {1: 0, 6: -1, 8: 1}[orientation]).astype(np.float32) / np.iinfo(samples.dtype).max
    assert_close(picture.rgb[0].permute(1, 2, 0), torch.from_numpy(wanted.copy()))


def test_text_and_colour_words_of_png_are_kept():
    words = PngInfo()
    words.add_text("Author", "A. Nonymous")
    words.add(b"sRGB", b"\1")
    words.add(b"gAMA", struct.pack(">I", 45455))
    Image.fromarray(smooth(3)).save("in.png", pnginfo=words)
    for top, name in ((255, "out.png"), (65535, "deep.png")):
        picture = read_file("in.png")
        form = picture.form if top == 255 else Form(kind="file", depth=16, info=picture.form.info)
        write_picture(from_samples(smooth(3, top=top), form), name)
        info = Image.open(name).info
        assert (info["Author"], info["srgb"]) == ("A. Nonymous", 1)
        assert info["gamma"] == pytest.approx(0.45455)


def test_transparency_is_not_dropped_in_silence():
    picture = read_file(saved("in.png", "RGBA"))
    with pytest.raises(InputError, match="no transparency"):
        write_picture(picture, "out.jpg")
    assert not Path("out.jpg").exists()
    opaque = smooth(4)
    opaque[..., 3] = 255
    write_picture(read_picture(opaque), "out.jpg")
    assert Image.open("out.jpg").mode == "RGB"


def test_a_small_round_icon_stays_round_in_a_gif():
    """Most of its alpha is soft once it is enlarged, and a GIF has none such."""
    samples = smooth(4, (64, 64))
    y, x = np.mgrid[:64, :64] - 31.5
    samples[..., 3] = (np.clip(38 - np.hypot(x, y), 0, 20) / 20 * 255).round()
    soft = from_samples(samples, Form(kind="file", mode="PA", format="GIF"))
    assert float(((soft.alpha > 0.1) & (soft.alpha < 0.9)).float().mean()) > 0.1
    write_picture(soft, "icon.gif")
    again = read_file("icon.gif")
    assert again.alpha is not None
    assert_close(again.alpha, (soft.alpha >= 128 / 255).float())


def test_the_clear_gray_value_of_a_16_bit_png_is_read():
    samples = RNG.integers(0, 65536, (9, 7)).astype(np.uint16)
    samples[2:4, 1:5] = 1000
    data = cv2.imencode(".png", samples)[1].tobytes()
    clear = struct.pack(">I4sHI", 2, b"tRNS", 1000, zlib.crc32(b"tRNS" + struct.pack(">H", 1000)))
    at = data.index(b"IDAT") - 4
    Path("in.png").write_bytes(data[:at] + clear + data[at:])
    picture = read_file("in.png")
    assert (picture.form.mode, picture.form.depth) == ("LA", 16)
    assert_close(picture.alpha[0, 0], torch.from_numpy(np.where(samples == 1000, 0, 1).astype(np.float32)))
    with pytest.raises(InputError, match="no transparency"):
        write_picture(picture, "out.jpg")
    write_picture(picture, "out.png")
    again = read_file("out.png")
    for before, after in ((picture.rgb, again.rgb), (picture.alpha, again.alpha)):
        assert_close(after, before, atol=0, rtol=0)


def test_noise_can_be_written_as_jpeg():
    noise = np.clip(RNG.normal(127, 80, (600, 600, 3)), 0, 255).astype(np.uint8)
    write_picture(from_samples(noise, Form(kind="file")), "out.jpg")
    assert read_file("out.jpg").size == (600, 600)
    assert os.listdir() == ["out.jpg"]


@pytest.mark.parametrize("said_by", ["tag", "xmp"])
def test_the_header_of_a_turned_file_gives_the_size_that_is_read(said_by: str):
    Image.fromarray(smooth(3)).save("in.tif", tiffinfo={274: 6} if said_by == "tag" else {700: b'tiff:Orientation="6"'})
    Image.fromarray(smooth(3)).save("plain.tif")
    assert header_size("in.tif") == read_file("in.tif").size == (33, 21)
    assert header_size("plain.tif") == (21, 33)


@pytest.mark.parametrize("profile", [None, SRGB[:100]], ids=["no profile", "profile"])
def test_cmyk_becomes_rgb_where_it_must(profile: bytes | None):
    saved("in.jpg", "CMYK")
    if profile:
        Image.open("in.jpg").save("in.jpg", quality=95, icc_profile=profile)
    picture = read_file("in.jpg")
    write_picture(picture, "out.png")
    after = Image.open("out.png")
    assert after.mode == "RGB"
    assert "icc_profile" not in after.info
    assert np.abs(np.asarray(after, float) / 255 - picture.rgb[0].permute(1, 2, 0).numpy()).max() < 0.01


def test_a_camera_file_with_a_second_picture_is_its_first_picture():
    Image.fromarray(smooth(3)).save("in.mpo", save_all=True, append_images=[Image.fromarray(smooth(3))])
    os.replace("in.mpo", "in.jpg")
    assert Image.open("in.jpg").n_frames == 2
    picture = read_file("in.jpg")
    write_picture(picture, "out.jpg")
    assert Image.open("out.jpg").format == "JPEG"


def bomb() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def animated(name: str, suffix: str) -> bytes:
    frames = [Image.fromarray(smooth(3)), Image.fromarray(smooth(3)[::-1].copy())]
    frames[0].save(f"{name}.{suffix}", save_all=True, append_images=frames[1:])
    return Path(f"{name}.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", "empty"),
        ("text.png", b"Dear Sir or Madam,\n", "not a PNG"),
        ("zeros.png", bytes(1000), "not a PNG"),
        ("vector.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a PNG"),
        ("bomb.png", bomb(), "pixels, refused"),
        ("signature.png", b"\x89PNG\r\n\x1a\n", "not a PNG|damaged"),
    ],
)
def test_bad_files_are_refused_in_one_line(name: str, content: bytes, words: str):
    Path(name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_file(name)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animated_and_multi_page_files_are_refused(suffix: str):
    animated("moving", suffix)
    with pytest.raises(InputError, match="2 frames or pages"):
        read_file(f"moving.{suffix}")


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGB"), ("jpg", "RGB"), ("webp", "RGB"), ("tif", "RGB"), ("bmp", "L")]
)
def test_files_cut_short_are_refused(suffix: str, mode: str):
    data = saved(f"whole.{suffix}", mode).read_bytes()
    for share in (0.3, 0.6, 0.9):
        Path(f"cut.{suffix}").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match=f"cut.{suffix}: "):
            read_file(f"cut.{suffix}")


def test_too_many_pixels_are_refused_before_they_are_decoded():
    saved("in.png", "RGB")
    with pytest.raises(InputError, match="33 x 21 is more than 100 pixels"):
        read_file("in.png", max_pixels=100)


def test_an_output_appears_whole_or_not_at_all():
    Path("kept.png").write_bytes(b"before")

    def write_and_fail(path: str, error: Exception) -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail("kept.png", RuntimeError("stop"))
    assert Path("kept.png").read_bytes() == b"before"
    with pytest.raises(InputError, match="No space left"):
        write_and_fail("full.png", OSError(28, "No space left on device"))
    assert sorted(os.listdir()) == ["kept.png"]
    with atomic_file("folder/new.png") as file:
        file.write(b"whole")
    assert os.listdir("folder") == ["new.png"]


def test_a_full_disk_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    picture = read_picture(smooth(3))

    def full(path: Path, mode: str) -> Any:
        return open("/dev/full", "r+b", buffering=0)

    monkeypatch.setattr("morsr.models.picture_files.open", full, raising=False)
    with pytest.raises(InputError, match=r"out.png: cannot be written \(No space left"):
        write_picture(picture, "out.png")
    assert os.listdir() == []


def test_targets_that_cannot_be_written_are_told():
    picture = read_picture(smooth(3))
    Path("file").write_bytes(b"")
    os.mkdir("folder.png")
    for target, words in (
        ("out.xyz", "output format"),
        ("out", "no suffix"),
        ("file/out.png", "cannot be written"),
        ("folder.png", "this is a folder"),
    ):
        with pytest.raises(InputError, match=words):
            write_picture(picture, target)
    wide = read_picture(np.zeros((1, 16384, 3), np.uint8))
    with pytest.raises(InputError, match="16383 pixels a side"):
        write_picture(wide, "out.webp")
    assert sorted(os.listdir()) == ["file", "folder.png"]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_no_permission_is_told():
    os.mkdir("locked")
    os.chmod("locked", 0o500)
    with pytest.raises(InputError, match="Permission denied"):
        write_picture(read_picture(smooth(3)), "locked/out.png")


def test_the_odd_images_come_back_as_they_were(shared_data: Path, tmp_path: Path):
    files = sorted((shared_data / "odd_images").iterdir())
    assert len(files) >= 9
    for path in files:
        picture = read_file(path)
        write_picture(picture, tmp_path / path.name)
        again = read_file(tmp_path / path.name)
        assert (again.form.mode, again.form.depth, again.form.icc) == (
            picture.form.mode,
            picture.form.depth,
            picture.form.icc,
        )
        assert_close(again.rgb, picture.rgb, atol=0 if path.suffix == ".png" else 0.08, rtol=0)
        assert (picture.alpha is None) == (again.alpha is None)
        if picture.alpha is not None:
            assert_close(again.alpha, picture.alpha, atol=0, rtol=0)
