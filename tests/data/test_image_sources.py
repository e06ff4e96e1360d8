"""Reading images of any kind, and finding them in folders, lists, manifests and scikit-image."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from morsr.data.degraded import image_key
from morsr.data.images import (
    ImageList,
    find_images,
    image_size,
    list_images,
    load_image,
    skimage_photographs,
)
from morsr.data.manifests import ManifestRow, file_hash, read_list, read_manifest, read_rows, write_manifest
from morsr.errors import ConfigError, InputError
from morsr.files import printable


def test_every_mode_becomes_rgb(tmp_path: Path):
    ramp = np.arange(48, dtype=np.uint8).reshape(6, 8)
    rgb = np.stack([ramp, ramp + 50, ramp + 100], axis=-1)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(ramp).save(tmp_path / "gray.png")
    Image.fromarray(np.dstack([rgb, 255 - ramp])).save(tmp_path / "alpha.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(load_image(tmp_path / "rgb.png"), rgb)
    np.testing.assert_array_equal(load_image(tmp_path / "alpha.png"), rgb)
    for name in ("gray.png", "deep.png"):
        np.testing.assert_array_equal(load_image(tmp_path / name), np.repeat(ramp[..., None], 3, axis=2))


def test_noted_rotation_is_applied(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").shape == (8, 6, 3)
    assert image_size(tmp_path / "turned.png") == (6, 8)


def test_damaged_files_are_input_errors(tmp_path: Path, photos: Path):
    whole = (photos / "photo0.png").read_bytes()
    for name, content in (("empty.png", b""), ("text.jpg", b"hello"), ("cut.png", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match=r"missing\.png"):
        load_image(tmp_path / "missing.png")


def test_sizes_are_read_without_decoding(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, size in (("photo3.png", (84, 64)), ("photo3.jpg", (84, 64)), ("photo3.webp", (84, 64))):
        Image.open(photos / "photo3.png").save(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
            assert image_size(tmp_path / name) == size


def test_a_rotation_noted_behind_the_pixels_counts(photos: Path, tmp_path: Path):
    import zlib

    whole = (photos / "photo3.png").read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    (tmp_path / "late.png").write_bytes(whole[:-12] + chunk + whole[-12:])
    assert load_image(tmp_path / "late.png").shape == (84, 64, 3)
    assert image_size(tmp_path / "late.png") == (64, 84)


def test_a_png_that_is_cut_short_is_found_without_decoding(photos: Path, tmp_path: Path):
    whole = (photos / "photo0.png").read_bytes()
    for kept in (len(whole) // 2, len(whole) - 12):
        (tmp_path / "cut.png").write_bytes(whole[:kept])
        with pytest.raises(InputError, match=r"cut\.png: .*cut short"):
            image_size(tmp_path / "cut.png")


def test_folders_are_searched_recursively_and_sorted(photos: Path):
    (photos / "notes.txt").write_text("no image")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "contact_sheet.png").write_bytes(b"made by morsr degrade")
    found = find_images(photos)
    assert [Path(path).name for path in found] == [f"photo{number}.png" for number in range(7)]
    with pytest.raises(InputError, match="there is none"):
        find_images(photos / "absent")
    (photos / "empty").mkdir()
    with pytest.raises(InputError, match="no image"):
        find_images(photos / "empty")


def test_links_that_lead_back_and_hidden_folders_are_left_out(photos: Path, tmp_path: Path):
    inside, elsewhere = photos / "inside", tmp_path / "elsewhere"
    for folder in (inside, photos / ".cache", elsewhere):
        folder.mkdir()
        shutil.copy(photos / "photo0.png", folder / "copy.png")
    for link, target in (
        (inside / "loop", "."), (inside / "up", ".."), (photos / "around", tmp_path), (photos / "other", elsewhere),
        (elsewhere / "back", photos),
    ):  # fmt: skip
        link.symlink_to(target)
    found = [str(Path(path).relative_to(photos)) for path in find_images(photos)]
    own = [*(f"photo{number}.png" for number in range(5)), "sub/photo5.png", "sub/photo6.png"]
    assert found == ["inside/copy.png", "other/copy.png", *own]
    (photos / "beside").symlink_to(elsewhere)
    assert "beside/copy.png" in {str(Path(path).relative_to(photos)) for path in find_images(photos)}
    assert [Path(path).name for path in find_images(photos / ".cache")] == ["copy.png"], "named by its user"


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_no_utf_8_have_a_key_of_their_own(tmp_path: Path):
    name = os.fsdecode(b"caf\xe9")
    assert printable(name) == "caf\\udce9"
    assert printable("café") == "café"
    assert len({image_key(stem, 0) for stem in (name, os.fsdecode(b"caf\xe8"), "café", "caf")}) == 4
    assert image_key("café", 3) == 5680005842969798773
    Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert len(list_images(str(tmp_path)).digest()) == 32


def test_text_lists_and_meta_files(tmp_path: Path, photos: Path):
    listing = tmp_path / "meta.txt"
    listing.write_text("# chosen\nphotos/photo0.png (64,72,3)\n\nphotos/a b.png, photos/other.png\nphotos/plain.PNG\n")
    expected = [tmp_path / "photos" / name for name in ("photo0.png", "a b.png", "plain.PNG")]
    assert [Path(path) for path in read_list(listing)] == expected
    assert Path(read_list(listing, root="/data")[0]) == Path("/data/photos/photo0.png")
    listing.write_text("\n# nothing\n")
    with pytest.raises(InputError, match="names no image"):
        list_images(str(listing))


def test_lists_with_a_mark_at_their_start(tmp_path: Path):
    for name, text in (("list.txt", "a.png\nb.png\n"), ("m.csv", "path\na.png\nb.png\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [Path(path).name for path in list_images(str(tmp_path / name)).paths] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("scan.tif edited.png", "scan.tif edited.png"),
        ("scan.tif edited.png (480,480,3)", "scan.tif edited.png"),
        ("a.png\t480,480,3", "a.png"),
        ("a.png\t(480, 480, 3)", "a.png"),
        ("a.JPEG 7", "a.JPEG"),
        ("a 2.png,480,480", "a 2.png"),
        ("a.png copy", "a.png copy"),
        ("no ending (480,480,3)", "no ending (480,480,3)"),
    ],
)
def test_only_numbers_behind_a_name_are_cut_off(tmp_path: Path, line: str, name: str):
    (tmp_path / "list.txt").write_text(f"{line}\n")
    assert read_list(tmp_path / "list.txt", root="r") == [f"r/{name}"]


def test_rarer_endings_are_read_and_unread_ones_named(tmp_path: Path):
    (tmp_path / "a.dng").write_bytes(b"")
    with pytest.raises(InputError, match=r"has no image; .*; 1 file has an ending that is not read .*\(\.dng 1\)"):
        find_images(tmp_path)
    for name in ("b.jfif", "c.JPE"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="JPEG")
    assert [load_image(path).shape for path in find_images(tmp_path)] == [(8, 8, 3)] * 2


def test_manifest_round_trip(tmp_path: Path, photos: Path):
    path = photos / "photo1.png"
    rows = [ManifestRow("photos/photo1.png", 76, 64, file_hash(path), 2.5), ManifestRow("photos/x, y.png", 1, 2, "")]
    write_manifest(tmp_path / "m.csv", rows)
    assert read_rows(tmp_path / "m.csv") == rows
    images = read_manifest(tmp_path / "m.csv")
    assert images.paths[0] == str(path)
    assert images.sizes.tolist() == [[76, 64], [1, 2]]
    assert images.weights.tolist() == [2.5, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,width\na.png,3\n", "column path"),
        ("path,colour\na.png,red\n", "unknown columns"),
        ("path,width\na.png,wide\n", "line 2"),
        ("path,weight\na.png,-1\n", "weight of at least 0"),
        ("path\n", "names no image"),
        ("path,weight\na.png,0\n", "all weights are 0"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / "m.csv")


def test_weights_of_sources_multiply_those_of_images(tmp_path: Path, photos: Path):
    write_manifest(tmp_path / "m.csv", [ManifestRow("a.png", 9, 9, "", 3.0)])
    joined = ImageList.join([list_images({"source": str(tmp_path / "m.csv"), "weight": 2}), list_images(str(photos))])
    assert joined.weights.tolist() == [6.0] + 7 * [1.0]
    kept = joined.keep(joined.weights > 1)
    assert [Path(path).name for path in kept.paths] == ["a.png"]


def test_embedded_photographs_are_these_and_no_others():
    train = [Path(path).stem for path in skimage_photographs("train")]
    assert train == ["motorcycle_left", "motorcycle_right", "brick", "grass", "gravel", "coins", "camera"]
    assert [Path(path).stem for path in list_images("skimage:eval").paths] == [
        "astronaut",
        "chelsea",
        "coffee",
        "rocket",
    ]
    assert load_image(skimage_photographs("train")[6]).shape == (512, 512, 3)
    with pytest.raises(ConfigError, match="skimage:all"):
        list_images("skimage:all")


@pytest.mark.parametrize(
    "source",
    [{"path": "x"}, {"source": "x", "wieght": 2}, {"source": 3}, {"lr": "a", "hr": "b"}, {"source": "x", "weight": 0}],
)
def test_wrong_sources_are_refused(source: dict):
    with pytest.raises(ConfigError):
        list_images(source)


def test_odd_images_of_the_data_folder(shared_data: Path):
    for path in find_images(shared_data / "odd_images"):
        image = load_image(path)
        assert image.dtype == np.uint8
        assert image.shape == (*image_size(path)[::-1], 3)
