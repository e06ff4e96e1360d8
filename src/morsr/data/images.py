"""Image files: finding them, reading them, and naming where they come from.

A source is what a config writes under `train`, `val` or `test`:
    photos/                     a folder, searched with its subfolders
    list.txt                    one path a line; sizes that follow it, as in basicsr's meta files, are passed over
    manifest.csv                columns path, width, height, hash, weight (see manifests.py)
    skimage:train, skimage:eval the photographs that come with scikit-image, for training and held out
    {source: S, weight: 2.0, root: DIR}    any of these; each image is drawn twice as often; paths are relative to DIR;
                                also `name`, what tables call it
    {lr: DIR, hr: DIR}          pairs of files with equal stems (see pairs.py)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from morsr.errors import ConfigError, InputError, MissingDependencyError
from morsr.functional.checksums import IMAGE_FORMATS, check_png
from morsr.models.jobs import CONTACT_SHEET as CONTACT_SHEET
from morsr.models.jobs import unread_images, walk_images
from morsr.models.picture import tiff_gray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})

SKIMAGE = {
    "train": ("motorcycle_left", "motorcycle_right", "brick", "grass", "gravel", "coins", "camera"),
    "eval": ("astronaut", "chelsea", "coffee", "rocket"),
}

Source = str | dict[str, Any]


@dataclass(frozen=True)
class ImageList:
    """Image files that may not all be readable.

    paths: one per image. weights: float64 (n,), how often an image is drawn relative to one of weight 1.
    sizes: int64 (n, 2) of width and height where known, else 0. names: what the config called the sources.
    partners: the LR files of real pairs, None for single images; empty where there are only these.
    """

    paths: tuple[str, ...]
    weights: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...] = ()
    partners: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def keep(self, mask: np.ndarray) -> ImageList:
        """The images where the mask (n,) is True."""
        paths = tuple(path for path, kept in zip(self.paths, mask, strict=True) if kept)
        partners = tuple(compress(self.partners, mask))
        return ImageList(paths, self.weights[mask], self.sizes[mask], self.names, partners)

    def digest(self) -> str:
        """32 hexadecimal digits that change with the files' names, their order, weights or known sizes."""
        digest = hashlib.blake2b(digest_size=16)
        names = "\n".join(os.path.basename(path) for path in self.paths)
        digest.update(names.encode("utf-8", "surrogateescape"))
        digest.update(self.weights.tobytes() + self.sizes.tobytes())
        return digest.hexdigest()

    @classmethod
    def of(cls, paths: Sequence[str], name: str, *, partners: Sequence[str] = ()) -> ImageList:
        """Files of weight 1 and unknown size, with the LR files of real pairs."""
        sizes = np.zeros((len(paths), 2), np.int64)
        return cls(tuple(paths), np.ones(len(paths)), sizes, (name,), tuple(partners))

    @classmethod
    def join(cls, parts: Sequence[ImageList]) -> ImageList:
        """All images of several lists, in their order."""
        if not parts:
            return cls((), np.zeros(0), np.zeros((0, 2), np.int64))
        return cls(
            tuple(path for part in parts for path in part.paths),
            np.concatenate([part.weights for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            tuple(name for part in parts for name in part.names),
            tuple(partner for part in parts for partner in part.partners or (None,) * len(part)),
        )


def load_image(path: str | Path) -> np.ndarray:
    """Read an image file as 8-bit RGB.

    Rotation noted in the file is applied, gray is repeated to three channels, 16-bit values become 8-bit ones, and
    transparency is dropped.

    Returns:
        uint8 (H, W, 3).

    Raises:
        InputError: the file is missing, empty, cut short or no image.
    """
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


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image after its noted rotation, without decoding its pixels.

    Raises:
        InputError: the file is missing, no image, or a PNG that is cut short.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as picture:
            # Pillow decodes a whole PNG in search of notes behind the pixels, which hardly any file has.
            plain = picture.format == "PNG" and not _has_late_notes(path)
            notes = Image.Image.getexif(picture) if plain else picture.getexif()
            return picture.size[::-1] if notes.get(0x0112, 1) in (5, 6, 7, 8) else picture.size
    except Exception as error:
        raise InputError(f"{path}: cannot be read as an image ({_first_line(error)})") from error


def _has_late_notes(path: str | Path) -> bool:
    """Whether a PNG file has Exif or text chunks behind its pixels; raises OSError where its end is missing."""
    behind, notes = False, False
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = int.from_bytes(head[:4], "big"), head[4:]
            if name == b"IEND":
                return notes
            behind = behind or name == b"IDAT"
            notes = notes or (behind and name in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"))
            file.seek(length + 4, os.SEEK_CUR)
    raise OSError("the file is cut short")


def find_images(folder: str | Path) -> list[str]:
    """Paths of all images in a folder and its subfolders, sorted.

    What is left out, and which links are followed: see `morsr.models.jobs.walk_images`.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: expected a folder of images, and there is none")
    found = sorted(walk_images(folder, SUFFIXES))
    if not found:
        text = f"{folder}: the folder has no image; expected files ending in {', '.join(sorted(SUFFIXES))}"
        raise InputError("; ".join(filter(None, [text, unread_images(folder, SUFFIXES)])))
    return found


def skimage_photographs(which: str) -> list[str]:
    """Paths of the photographs that come with scikit-image: "train" (7) or "eval" (4, held out).

    Raises:
        ConfigError: another name.
        MissingDependencyError: scikit-image, or one of the files, is not installed.
    """
    if which not in SKIMAGE:
        raise ConfigError(f"skimage:{which}: expected skimage:train or skimage:eval")
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("the embedded photographs come with scikit-image: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    paths = []
    for name in SKIMAGE[which]:
        found = [folder / f"{name}{suffix}" for suffix in (".png", ".jpg") if (folder / f"{name}{suffix}").is_file()]
        if not found:
            raise MissingDependencyError(f"{folder}: this scikit-image lacks {name}; pip install scikit-image==0.26")
        paths.append(str(found[0]))
    return paths


def is_paired(source: Source) -> bool:
    """Whether a source names two folders of pairs."""
    return isinstance(source, Mapping) and ("lr" in source or "hr" in source)


def list_images(source: Source) -> ImageList:
    """Find the images of one source; files are not opened.

    Raises:
        InputError: a missing or empty folder, list or manifest.
        ConfigError: unknown keys, a weight that is not above 0, or paired folders, which are no list of single images.
    """
    from morsr.data.manifests import read_list, read_manifest

    if is_paired(source):
        raise ConfigError(
            f"{source}: expected single images here, not paired folders; those go into train, val and test"
        )
    if not isinstance(source, str | Mapping):
        raise ConfigError(f"source: expected a path or {{source, weight, root, name}}, got {source!r}")
    settings = {"source": source} if isinstance(source, str) else dict(source)
    unknown = set(settings) - {"source", "weight", "root", "name"}
    if unknown or not isinstance(settings.get("source"), str):
        raise ConfigError(f"source: expected a path or {{source, weight, root, name}}, got {source}")
    name, root = settings["source"], settings.get("root")
    if not isinstance(root, str | Path | None):
        raise ConfigError(f"{name}: expected a folder as root, got {root!r}")
    weight = settings.get("weight", 1.0)
    if not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ConfigError(f"{name}: expected a weight above 0, got {weight!r}")
    if name.startswith("skimage:"):
        found = ImageList.of(skimage_photographs(name.removeprefix("skimage:")), name)
    elif name.lower().endswith(".csv"):
        found = read_manifest(name, root=root)
    elif name.lower().endswith(".txt"):
        found = ImageList.of(read_list(name, root=root), name)
    else:
        found = ImageList.of(find_images(name), name)
    return ImageList(found.paths, found.weights * float(weight), found.sizes, found.names)


def source_root(source: Source) -> Path:
    """The folder that the paths of a source are relative to."""
    settings = {"source": source} if isinstance(source, str) else source
    path = Path(settings["source"])
    if path.suffix.lower() not in (".csv", ".txt"):
        return path
    return Path(settings["root"]) if settings.get("root") is not None else path.parent


def distinct_names(roots: Mapping[str, Path]) -> dict[str, str]:
    """A name for every image that no other has: its stem, or as much of its path as that takes.

    Args:
        roots: path of each image, and the folder that its name may be relative to.
    """
    named = {path: Path(path).stem for path in roots}
    for longer in (_relative, _with_suffix, _whole):
        often = Counter(named.values())
        named = {path: longer(path, roots[path]) if often[name] > 1 else name for path, name in named.items()}
    return named


def _relative(path: str, root: Path) -> str:
    inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path(path)
    return inside.with_suffix("").as_posix()


def _with_suffix(path: str, root: Path) -> str:
    # without the dot: a table's reader takes `a.png` for `a`
    return f"{_relative(path, root)}_{Path(path).suffix[1:]}"


def _whole(path: str, root: Path) -> str:
    return _with_suffix(path, Path(Path(path).anchor))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
