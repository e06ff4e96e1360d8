"""Folders for results are checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from morsr.data.outputs import output_folder
from morsr.errors import InputError


def test_a_folder_is_made_with_those_above(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert output_folder(tmp_path / "a" / "b").is_dir()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"{path.name}: cannot be made .*choose another folder"):
            output_folder(path)


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A superuser may write anywhere, so the system's answer is what is replaced here.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(InputError, match="cannot be written; choose another folder"):
        output_folder(tmp_path)
