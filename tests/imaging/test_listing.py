"""Which files of a folder are images."""

import os
from pathlib import Path
from typing import Any

import pytest

from morsr.errors import InputError
from morsr.imaging import list_images


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")


def test_images_come_in_natural_order_folder_by_folder():
    touch(
        "in/f10.png",
        "in/f2.PNG",
        "in/f2.jpg",
        "in/a/x.webp",
        "in/notes.txt",
        "in/b/1.JFIF",
        "in/b/10.tif",
        "in/b/9.bmp",
    )
    expected = ["f2.PNG", "f2.jpg", "f10.png", "a/x.webp", "b/1.JFIF", "b/9.bmp", "b/10.tif"]
    assert list_images("in") == [Path("in", name) for name in expected]
    assert list_images("in/notes.txt") == [Path("in/notes.txt")], "a single file is taken whatever it is called"


def test_hidden_files_and_what_is_no_file_are_left_out():
    touch("in/a.png", "in/.b.png", "in/.c/d.png")
    os.mkfifo("in/pipe.png")
    Path("in/zero.png").symlink_to("/dev/zero")
    Path("in/gone.png").symlink_to("nowhere.png")
    Path("in/folder.png").mkdir()
    assert list_images("in") == [Path("in/a.png")]


def test_linked_folders_are_followed_but_not_in_circles():
    touch("in/sub/a.png", "beside/b.png")
    Path("in/linked").symlink_to(Path("beside").resolve())
    Path("in/sub/back").symlink_to(Path("in").resolve())
    Path("beside/on").symlink_to(Path("in").resolve())
    assert list_images("in") == [Path("in/linked/b.png"), Path("in/sub/a.png")]


def test_a_folder_that_cannot_be_read_is_said(monkeypatch):
    touch("in/a.png", "in/locked/b.png")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="locked: cannot be read"):
        list_images("in")


@pytest.mark.parametrize("source", ["missing", "empty", "pipe.png"])
def test_nothing_to_list_is_refused(source):
    touch("empty/1.heic")
    os.mkfifo("pipe.png")
    with pytest.raises(InputError, match=source):
        list_images(source)
