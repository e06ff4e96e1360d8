"""Which files of a folder are restored, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from morsr.errors import InputError
from morsr.models.jobs import find_images, folder_jobs, unread_images
from morsr.models.picture import from_pil
from morsr.models.picture_files import file_format, read_file, write_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one image in a subfolder, and another folder beside it with one image."""
    for name in ("in/sub/a.png", "beside/b.JFIF"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    return tmp_path / "in"


def test_linked_folders_are_followed_but_not_in_circles(folder: Path):
    (folder / "linked").symlink_to(folder.parent / "beside")
    (folder / "sub" / "back").symlink_to(folder)
    assert find_images(folder) == [folder / "linked" / "b.JFIF", folder / "sub" / "a.png"]
    targets = [job.target.relative_to(folder.parent) for job in folder_jobs(folder, folder.parent / "out")]
    assert targets == [Path("out/linked/b.JFIF"), Path("out/sub/a.png")]


def test_contact_sheets_are_not_restored(folder: Path):
    (folder / "contact_sheet.png").write_bytes(b"")
    assert find_images(folder) == [folder / "sub" / "a.png"]


def test_images_that_are_not_read_are_counted_by_their_endings(folder: Path):
    assert unread_images(folder) == ""
    for name in ("1.HEIC", "sub/2.heic", "3.dng", ".4.heic", "notes.txt"):
        (folder / name).write_bytes(b"")
    assert unread_images(folder) == "3 files have endings that are not read and were left out (.heic 2, .dng 1)"
    (folder / "sub" / "a.png").unlink()
    with pytest.raises(InputError, match=r"no images .* in this folder; 3 files have endings that are not read"):
        folder_jobs(folder, folder.parent / "out")


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE"])
def test_jpeg_under_its_rarer_endings(tmp_path: Path, name: str):
    image = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    write_picture(from_pil(image), tmp_path / name)
    assert Image.open(tmp_path / name).format == file_format(name) == "JPEG"
    assert read_file(tmp_path / name).form.format == "JPEG"
