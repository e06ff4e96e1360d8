"""Sources: which files they name, what the images are called, and what is refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import save

from morsr.data.sources import Photo, check_names, crop_to_multiple, find_photos
from morsr.errors import ConfigError, InputError

GRAY = np.full((32, 32, 3), 90, np.uint8)


def found(source: Any, root: Path) -> dict[str, str]:
    """Stem and path below `root` of every image of a source."""
    return {photo.stem: os.path.relpath(photo.hr, root) for photo in find_photos(source)}


def test_a_folder_is_searched_with_its_subfolders(photos):
    (photos / "notes.txt").write_text("no image")
    names = [f"photo{number}" for number in range(7)]
    assert found(str(photos), photos) == {n: f"{'sub/' if n > 'photo4' else ''}{n}.png" for n in names}
    assert {(photo.source, photo.weight, photo.lr) for photo in find_photos(str(photos))} == {("photos", 1.0, None)}


def test_images_that_share_a_stem_are_called_by_their_paths(tmp_path):
    names = {"x/1.png": "x/1_png", "y/1.png": "y/1_png", "y/2.png": "2", "z/3.png": "z/3_png", "z/3.bmp": "z/3_bmp"}
    for name in names:
        save(tmp_path / "in" / name, GRAY)
    assert found(str(tmp_path / "in"), tmp_path / "in") == {stem: path for path, stem in names.items()}
    (tmp_path / "list.txt").write_text("x/1.png\ny/1.png\ny/2.png\ny/2.png\n")
    assert list(found({"source": "list.txt", "root": "in"}, tmp_path)) == ["x/1_png", "y/1_png", "2"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("a.png", "a.png"),
        ("scan.tif edited.png (480,480,3)", "scan.tif edited.png"),
        ("a.png\t480,480,3", "a.png"),
        ("a.JPEG 7", "a.JPEG"),
        ("a b.png, photos/other.png", "a b.png"),
    ],
)
def test_a_list_has_a_path_a_line_and_numbers_behind_it_are_cut_off(line, name):
    Path("list.txt").write_text(f"# chosen\n\n{line}\n", encoding="utf-8-sig")
    assert [photo.hr for photo in find_photos("list.txt")] == [name]
    assert [photo.hr for photo in find_photos({"source": "list.txt", "root": "r"})] == [f"r/{name}"]


def test_embedded_photographs_are_these_and_no_others():
    train = ["motorcycle_left", "motorcycle_right", "brick", "grass", "gravel", "coins", "camera"]
    assert [photo.stem for photo in find_photos("skimage:train")] == train
    assert [photo.stem for photo in find_photos("skimage:eval")] == ["astronaut", "chelsea", "coffee", "rocket"]
    assert find_photos("skimage:train")[6].read()[0].shape == (512, 512, 3)


def test_folders_are_paired_by_stem(pairs):
    Path(pairs["hr"], "1.png").rename(Path(pairs["hr"], "1.bmp"))
    photos = find_photos({**pairs, "name": "N", "weight": 3})
    assert [Path(photo.hr).name for photo in photos] == ["0.png", "1.bmp", "2.png"]
    assert [Path(photo.lr or "").name for photo in photos] == ["0.png", "1.png", "2.png"]
    assert {(photo.source, photo.weight) for photo in photos} == {("N", 3.0)}
    pair = photos[0].load()
    np.testing.assert_array_equal(pair.hr, pair.lr.repeat(4, 0).repeat(4, 1))
    hr, lr = photos[0].read(multiple=64, largest=48)  # 96x80: the middle of the LR image, at whole pixels
    np.testing.assert_array_equal(lr, pair.lr[6:18, 4:16])
    np.testing.assert_array_equal(hr, pair.hr[24:72, 16:64])


def test_crops_are_central_and_multiples():
    image = np.arange(30 * 50 * 3).reshape(30, 50, 3)
    np.testing.assert_array_equal(crop_to_multiple(image, 16), image[7:23, 1:49])
    assert crop_to_multiple(image, 8, largest=17).shape == (16, 16, 3)


def read(**file: Any) -> Any:
    return lambda: Photo("a", **file).read(multiple=64)


BAD = {
    "no path": (lambda: find_photos(3), ConfigError),
    "nothing": (lambda: find_photos({}), ConfigError),
    "unknown key": (lambda: find_photos({"source": "x", "wieght": 2}), ConfigError),
    "one folder of two": (lambda: find_photos({"lr": "a"}), ConfigError),
    "weight of 0": (lambda: find_photos({"source": "x", "weight": 0}), ConfigError),
    "missing folder": (lambda: find_photos("absent"), InputError),
    "empty folder": (lambda: find_photos("empty"), InputError),
    "empty list": (lambda: find_photos("empty.txt"), InputError),
    "list that is no text": (lambda: find_photos("binary.txt"), InputError),
    "files without a partner": (lambda: find_photos({"lr": "one", "hr": "two"}), InputError),
    "two files of one stem": (lambda: find_photos({"lr": "two", "hr": "two"}), InputError),
    "two sources of one name": (lambda: check_names(["x/set", "y/set"]), ConfigError),
    "smaller than a multiple": (read(hr="one/a.png"), InputError),
    "pair of one size": (read(hr="one/a.png", lr="one/a.png"), InputError),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_refused(case):
    for name in ("one/a.png", "two/b.png", "two/b.bmp"):
        save(Path(name), GRAY)
    Path("empty").mkdir()
    Path("empty.txt").write_text("\n# nothing\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\xff")
    call, error = BAD[case]
    with pytest.raises(error):
        call()
