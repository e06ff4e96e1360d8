"""The image files of a folder, and their pixels as training reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from morsr.errors import InputError
from morsr.functional.checksums import IMAGE_FORMATS, check_png
from morsr.models.jobs import CONTACT_SHEET as CONTACT_SHEET
from morsr.models.jobs import unread_images, walk_images
from morsr.models.picture import tiff_gray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


def find_images(folder: str | Path) -> list[str]:
    """Paths of all images in a folder and its subfolders, sorted; regular files only.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a folder of images, and there is none")
    found = sorted(path for path in walk_images(folder, SUFFIXES) if Path(path).is_file())
    if not found:
        text = f"{folder}: the folder has no image; expected files ending in {', '.join(sorted(SUFFIXES))}"
        raise InputError("; ".join(filter(None, [text, unread_images(folder, SUFFIXES)])))
    return found


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image file as 8-bit RGB, upright, without transparency.

    Returns:
        uint8 (H, W, 3).

    Raises:
        InputError: the file is missing, empty, damaged or no image.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: expected an image file, and there is none")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            if file.format == "PNG":
                check_png(file.fp)
            file.load()
            tags = getattr(file, "tag_v2", {})
            picture = ImageOps.exif_transpose(file)
            if picture.mode == "F":
                raise InputError(f"{path}: expected whole numbers of 8 or 16 bits, got floating-point pixels")
            if picture.mode.startswith("I"):
                samples = tiff_gray(np.asarray(picture, dtype=np.float64), tags)
                gray = np.rint(samples / 257).clip(0, 255).astype(np.uint8)
                return np.repeat(gray[..., None], 3, axis=2)
            return np.asarray(picture.convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # Pillow raises SyntaxError, struct.error and more on damaged files
        raise InputError(f"{path}: cannot be read as an image ({_first_line(error)})") from error


load_image = read_rgb


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
