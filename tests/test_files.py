"""Files appear whole, or not at all, and as readable as any other new file."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from morsr.files import atomic_path, expanded, save_tensors, write_text


def test_a_home_folder_that_nobody_has_is_a_name():
    assert expanded("~/a") == Path.home() / "a"
    assert expanded("~$draft/a") == Path("~$draft/a")


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "folder" / "a.txt", "text")
        save_tensors(tmp_path / "folder" / "b.safetensors", {"x": torch.ones(3)}, {"key": "value"})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "folder").iterdir()} == {0o640}
    torch.testing.assert_close(load_file(tmp_path / "folder" / "b.safetensors"), {"x": torch.ones(3)})


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught:
        write_text(tmp_path / "file" / "inside.txt", "text")
    assert ".morsr-" not in str(caught.value)


@pytest.mark.parametrize("flush", [False, True])
def test_a_failed_write_leaves_the_old_file(flush, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def half() -> None:
        with atomic_path(path, flush=flush) as part:
            assert part.suffix == ".txt"
            part.write_text("ne")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/file\.txt'"):
        half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with atomic_path(path, flush=flush) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
