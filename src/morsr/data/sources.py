"""Where images come from: folders, lists, pairs of folders, and the photographs that scikit-image brings.

A source is what a config writes under `train`, `val` or `test`; docs/data.md lists the forms.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from morsr.errors import ConfigError, InputError
from morsr.imaging import SUFFIXES, list_images, read_rgb

SCALE = 4

SKIMAGE = {
    "train": ("motorcycle_left", "motorcycle_right", "brick", "grass", "gravel", "coins", "camera"),
    "eval": ("astronaut", "chelsea", "coffee", "rocket"),
}

Source = str | dict[str, Any]

# A name may hold blanks and several endings. Numbers behind the last ending (basicsr writes `a.png (480,480,3)`) are
# cut off, and so is what follows a comma and a blank, the other name of a pair.
_ENDING = "|".join(map(re.escape, sorted(SUFFIXES)))
_LINE = re.compile(rf"(.*?(?:{_ENDING}))(?:,\s.*|[,\s][\d\s.,x()\[\]]*)", re.IGNORECASE)


class Pair(NamedTuple):
    """One HR image and its LR image, in memory.

    stem: unique within a set. hr, lr: uint8 (H, W, 3) and (h, w, 3). group: the photograph, where several
    show one.
    """

    stem: str
    hr: np.ndarray
    lr: np.ndarray
    group: str | None = None


class Photo(NamedTuple):
    """A photograph, or two files that show the same.

    stem: its name, which no other image of its source has. hr: path. lr: path of a real LR image, None where a recipe
    makes it. source: name of its source. weight: how often it is drawn relative to one of weight 1.
    """

    stem: str
    hr: str
    lr: str | None = None
    source: str = ""
    weight: float = 1.0

    def read(
        self, *, multiple: int = 1, largest: int | None = None, scale: int = SCALE
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The central part of the HR image, and that of the LR image if there is one; uint8 (H, W, 3).

        Args:
            multiple: sides of the HR image become multiples of this; those of pairs are left.
            largest: HR sides are at most so many pixels; None leaves them.
            scale: HR pixels per LR pixel.

        Raises:
            InputError: a file that cannot be read or is too small, or a pair of sizes that do not fit.
        """
        hr = read_rgb(self.hr)
        if self.lr is None:
            try:
                return crop_to_multiple(hr, multiple, largest=largest), None
            except InputError as error:
                raise InputError(f"{self.hr}: {error}") from error
        lr = read_rgb(self.lr)
        check_scale(self.hr, hr, lr, scale)
        if largest is not None:
            top, left = (max(0, (side - largest // scale) // 2) for side in lr.shape[:2])
            side = largest // scale
            lr = lr[top : top + side, left : left + side]
            hr = hr[scale * top : scale * (top + side), scale * left : scale * (left + side)]
        return hr, lr

    def load(self) -> Pair:
        """Both images of a pair of files, whole."""
        hr, lr = self.read()
        if lr is None:
            raise InputError(f"{self.hr}: expected a pair of files, which this photograph is not")
        return Pair(self.stem, hr, lr)


def find_photos(source: Source) -> list[Photo]:
    """Find the images of one source; no file is opened.

    Raises:
        ConfigError: unknown keys or values.
        InputError: a missing or empty folder or list, or files without a partner.
    """
    settings: Any = {"source": source} if isinstance(source, str) else source
    if not isinstance(settings, Mapping):
        raise ConfigError(f"source: expected a path, {{source: S}} or {{lr: DIR, hr: DIR}}, got {source!r}")
    paired = "lr" in settings or "hr" in settings
    needed = {"lr", "hr"} if paired else {"source"}
    unknown = set(settings) - needed - {"name", "weight", "optional"} - (set() if paired else {"root"})
    if unknown or not all(isinstance(settings.get(key), str | Path) for key in needed):
        raise ConfigError(f"source: expected a path, {{source: S}} or {{lr: DIR, hr: DIR}}, got {source!r}")
    weight = settings.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise ConfigError(f"{source_name(source)}: expected a weight above 0, got {weight!r}")
    if is_absent(source):
        return []
    if paired:
        found = paired_folder(settings["lr"], settings["hr"])
    else:
        found = _single(str(settings["source"]), settings.get("root"))
    return [photo._replace(source=source_name(source), weight=float(weight)) for photo in found]


def paired_folder(lr: str | Path, hr: str | Path) -> list[Photo]:
    """Pair the images of two folders by stem, sorted by it; endings may differ.

    Raises:
        InputError: a missing or empty folder, files without a partner, or two files of one stem in a folder.
    """
    found_lr, found_hr = _by_stem(lr), _by_stem(hr)
    lonely = [found_lr[stem] for stem in sorted(set(found_lr) - set(found_hr))]
    lonely += [found_hr[stem] for stem in sorted(set(found_hr) - set(found_lr))]
    if lonely:
        raise InputError(f"{len(lonely)} files have no partner of the same stem: {some(lonely)}")
    return [Photo(stem, found_hr[stem], found_lr[stem]) for stem in sorted(found_lr)]


def source_name(source: Source) -> str:
    """What a source is called in tables: its `name`, or the last part of its path."""
    if not isinstance(source, str):
        if "name" in source:
            return str(source["name"])
        source = str(source.get("source") or Path(str(source.get("hr") or source.get("lr") or "")).parent)
    if source.startswith("skimage:"):
        return "embedded" if source == "skimage:eval" else source
    path = Path(os.path.abspath(source))  # "." has no last part
    return path.stem if path.suffix.lower() == ".txt" else path.name


def is_absent(source: Source) -> bool:
    """Whether a source is optional and not there."""
    if isinstance(source, str) or not source.get("optional"):
        return False
    places = [str(source[key]) for key in ("lr", "hr", "source") if key in source]
    return not all(place.startswith("skimage:") or Path(place).exists() for place in places)


def check_names(sources: Sequence[Source]) -> None:
    """Raise ConfigError for two sources of one name, whose images would be taken for one set."""
    often = Counter(source_name(source) for source in sources if not is_absent(source))
    twice = next((name for name, count in often.items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"two sources are called {twice!r}: give one a `name`, as in {{source: DIR, name: N}}")


def check_scale(path: str, hr: np.ndarray, lr: np.ndarray, scale: int) -> None:
    """Raise InputError where an HR image is not exactly `scale` times as large as its LR image."""
    (height, width), (small_height, small_width) = hr.shape[:2], lr.shape[:2]
    if (height, width) != (scale * small_height, scale * small_width):
        raise InputError(f"{path}: {width}x{height} pixels, its LR image has {small_width}x{small_height}")


def crop_to_multiple(image: np.ndarray, multiple: int, *, largest: int | None = None) -> np.ndarray:
    """The central part of an image (H, W, 3) whose sides are multiples, at most `largest`; InputError if empty."""
    height, width = (min(side, largest or side) // multiple * multiple for side in image.shape[:2])
    if min(height, width) == 0:
        raise InputError(f"expected at least {multiple} pixels a side, got {image.shape[1]}x{image.shape[0]}")
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def distinct_names(roots: Mapping[str, Path]) -> dict[str, str]:
    """A name for every image that no other has: its stem, or all of its path where several have the stem.

    Args:
        roots: path of each image, and the folder that its name may be relative to.
    """
    often = Counter(Path(path).stem for path in roots)
    names = {}
    for path, root in roots.items():
        names[path] = Path(path).stem
        if often[names[path]] > 1:
            inside = Path(path).relative_to(root if Path(path).is_relative_to(root) else Path(path).anchor)
            # without the dot: a table's reader takes `a.png` for `a`
            names[path] = f"{inside.with_suffix('').as_posix()}_{inside.suffix[1:]}"
    return names


def some(names: Sequence[str]) -> str:
    """The first five names and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _single(where: str, root: str | None) -> list[Photo]:
    if where.startswith("skimage:"):
        if (which := where.removeprefix("skimage:")) not in SKIMAGE:
            raise ConfigError(f"{where}: expected skimage:train or skimage:eval")
        folder = Path(str(resources.files("skimage"))) / "data"
        paths, top = [str(next(folder.glob(f"{name}.[pj][np]g"))) for name in SKIMAGE[which]], Path()
    elif where.lower().endswith(".txt"):
        top = Path(root) if root is not None else Path(where).parent
        paths = _listed(where, top)
    else:
        paths, top = sorted(map(str, list_images(where))), Path(where)
    return [Photo(stem, path) for path, stem in distinct_names(dict.fromkeys(paths, top)).items()]


def _listed(path: str, root: Path) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of images ({error})") from error
    names = [match[1] if (match := _LINE.fullmatch(line)) else line for line in lines if line and line[0] != "#"]
    if not names:
        raise InputError(f"{path}: the list names no image")
    return [str(root / name) for name in names]


def _by_stem(folder: str | Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(map(str, list_images(folder))):
        stem = Path(path).stem
        if stem in found:
            raise InputError(f"{folder}: two images have the stem {stem}: {found[stem]} and {path}")
        found[stem] = path
    return found
