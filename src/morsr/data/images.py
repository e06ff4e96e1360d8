"""The image files of a folder, and their pixels as training reads them."""

from __future__ import annotations

from pathlib import Path

from morsr import imaging
from morsr.errors import InputError
from morsr.imaging import SUFFIXES as SUFFIXES
from morsr.imaging.listing import CONTACT_SHEET as CONTACT_SHEET

read_rgb = load_image = imaging.read_rgb


def find_images(folder: str | Path) -> list[str]:
    """Paths of all images in a folder and its subfolders, sorted; see `morsr.imaging.list_images`.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a folder of images, and there is none")
    return sorted(map(str, imaging.list_images(folder)))
