"""LR/HR pairs, and folders that hold them (degraded.py makes pairs of single images)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from morsr.data.images import find_images, image_size, load_image
from morsr.errors import ConfigError, InputError

SCALE = 4


@dataclass(frozen=True)
class Pair:
    """One LR image made from one HR image.

    stem: unique among pairs of one call. image: stem of the HR file. lr, hr: uint8 (h, w, 3) and (4h, 4w, 3).
    parameters: the true degradation (a batch of one), None for pairs from files. seed: of the degradation, None for
    pairs from files. key: int64 key of the degradation, -1 for pairs from files. repeated: one device has it
    only so that all have as many; another one counts it.
    """

    stem: str
    lr: np.ndarray
    hr: np.ndarray
    parameters: Any = None
    seed: int | None = None
    image: str = ""
    key: int = -1
    repeated: bool = False


class PairPaths(NamedTuple):
    """Two files that show the same; where LR sides exceed `largest` pixels, the central part of both is taken."""

    stem: str
    lr: str
    hr: str
    largest: int | None = None

    def load(self) -> Pair:
        """Read both images."""
        lr, hr = load_image(self.lr), load_image(self.hr)
        if self.largest is not None:
            lr, hr = _central(lr, hr, self.largest)
        return Pair(self.stem, lr, hr, image=self.stem)


def crop_to_multiple(image: np.ndarray, multiple: int, *, largest: int | None = None) -> np.ndarray:
    """The central part of an image (H, W, 3) whose sides are multiples, at most `largest` pixels.

    Raises:
        InputError: an image smaller than one multiple.
    """
    height, width = (min(side, largest or side) // multiple * multiple for side in image.shape[:2])
    if min(height, width) == 0:
        raise InputError(f"expected at least {multiple} pixels a side, got {image.shape[1]}x{image.shape[0]}")
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def paired_folder(
    lr: str | Path, hr: str | Path, *, scale: int = SCALE, skipped: dict[str, str] | None = None
) -> list[PairPaths]:
    """Pair the images of two folders by stem, sorted by it.

    Args:
        lr, hr: the folders; file endings may differ.
        scale: HR pixels per LR pixel along each axis; every pair is checked by the files' headers.
        skipped: pairs with a file that is no image are left out and noted here, reason by path; None raises for the
            first one.

    Raises:
        InputError: a missing or empty folder, files without a partner, two files of one stem, or sizes that do not
            stand in this ratio; the message lists them.
    """
    found_lr, found_hr = _by_stem(lr), _by_stem(hr)
    lonely = [found_lr[stem] for stem in sorted(set(found_lr) - set(found_hr))]
    lonely += [found_hr[stem] for stem in sorted(set(found_hr) - set(found_lr))]
    if lonely:
        raise InputError(f"{len(lonely)} files have no partner of the same stem: {some(lonely)}")
    pairs, wrong = [], []
    for pair in [PairPaths(stem, found_lr[stem], found_hr[stem]) for stem in sorted(found_lr)]:
        try:
            (lr_width, lr_height), (hr_width, hr_height) = image_size(pair.lr), image_size(pair.hr)
        except InputError as error:
            if skipped is None:
                raise
            skipped[pair.hr] = str(error)
            continue
        pairs.append(pair)
        if (hr_width, hr_height) != (scale * lr_width, scale * lr_height):
            wrong.append(f"{pair.stem} ({lr_width}x{lr_height} and {hr_width}x{hr_height})")
    if wrong:
        raise InputError(f"{len(wrong)} pairs are not of sizes 1:{scale}: {some(wrong)}")
    return pairs


def source_name(source: str | dict[str, Any]) -> str:
    """What a source is called in tables: its `name`, or the last part of its path."""
    if isinstance(source, dict):
        if "name" in source:
            return str(source["name"])
        source = str(source.get("source") or Path(str(source.get("hr") or source.get("lr") or "")).parent)
    if source.startswith("skimage:"):
        return "embedded" if source == "skimage:eval" else source
    path = Path(os.path.abspath(source))  # "." has no last part
    return path.stem if path.suffix.lower() in (".csv", ".txt") else path.name


def check_names(sources: Sequence[str | dict[str, Any]]) -> None:
    """Raise ConfigError for two sources of one name, whose images would be taken for one set."""
    seen: dict[str, str | dict[str, Any]] = {}
    for source in sources:
        if _is_absent(source):
            continue
        name = source_name(source)
        if name in seen:
            raise ConfigError(
                f"two sources are called {name!r}: {seen[name]} and {source}; give each a `name` of its own, as in "
                "{source: DIR, name: N} or {lr: DIR, hr: DIR, name: N}"
            )
        seen[name] = source


def paired_source(
    source: dict[str, Any], *, scale: int, skipped: dict[str, str] | None = None
) -> list[tuple[str, PairPaths]]:
    """The pairs of {lr, hr, name, optional}, each with the source's name.

    Raises:
        ConfigError: unknown or missing keys, or folders that are no paths.
        InputError: as `paired_folder`, unless the folders are missing and the source is optional.
    """
    unknown = set(source) - {"lr", "hr", "name", "optional"}
    if unknown or not all(isinstance(source.get(side), str | Path) for side in ("lr", "hr")):
        raise ConfigError(f"source: expected {{lr, hr, name, optional}} with two folders, got {source}")
    if _is_absent(source):
        return []
    pairs = paired_folder(source["lr"], source["hr"], scale=scale, skipped=skipped)
    return [(source_name(source), pair) for pair in pairs]


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to uint8 (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _central(lr: np.ndarray, hr: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """The same central part of both images (h, w, 3) and (H, W, 3), at whole LR pixels."""
    scale = hr.shape[0] // lr.shape[0]
    height, width = (min(side, largest) for side in lr.shape[:2])
    top, left = (lr.shape[0] - height) // 2, (lr.shape[1] - width) // 2
    return (
        np.ascontiguousarray(lr[top : top + height, left : left + width]),
        np.ascontiguousarray(hr[scale * top : scale * (top + height), scale * left : scale * (left + width)]),
    )


def _is_absent(source: str | dict[str, Any]) -> bool:
    if not isinstance(source, dict) or not source.get("optional"):
        return False
    return not all(Path(str(source[side])).is_dir() for side in ("lr", "hr") if side in source)


def _by_stem(folder: str | Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in find_images(folder):
        stem = Path(path).stem
        if stem in found:
            raise InputError(f"{folder}: two images have the stem {stem}: {found[stem]} and {path}")
        found[stem] = path
    return found


def some(names: Iterable[str], most: int = 10) -> str:
    """The first names of a list and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
