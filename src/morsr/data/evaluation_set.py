"""Images that are taken whole: pairs for validation and tests, single images for prediction."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from morsr.data.degraded import DegradedImage
from morsr.data.images import load_image
from morsr.data.pairs import Pair, PairPaths, paired_source, source_name, to_tensor
from morsr.errors import ConfigError, InputError


class PairedImages(Dataset):
    """Pairs that were degraded once or lie in two folders, each with the name of its source.

    Args:
        items: names and pairs; an item of the set is a name and a `Pair` with its pixels.
        devices: how many share the set. All must see as many images, since they exchange something after every batch;
            where that takes more images than there are, the first come again, marked as repeated.
    """

    def __init__(self, items: list[tuple[str, DegradedImage | PairPaths]], *, devices: int = 1) -> None:
        self.items, self.devices = items, devices

    def __len__(self) -> int:
        return math.ceil(len(self.items) / self.devices) * self.devices

    def __getitem__(self, place: int) -> tuple[str, Pair]:
        if place >= len(self):
            raise IndexError(place)
        name, pair = self.items[place % len(self.items)]
        return name, replace(pair.load(), repeated=place >= len(self.items))


def pairs_of(source: dict[str, Any], *, scale: int, skipped: dict[str, str]) -> list[tuple[str, PairPaths]]:
    """The pairs of {lr, hr, name, optional} that can be read, each with the source's name.

    Raises:
        ConfigError, InputError: as `paired_source`, or none of the pairs can be read.
    """
    bad: dict[str, str] = {}
    pairs = readable(paired_source(source, scale=scale, skipped=bad), skipped=bad)
    if bad and not pairs:
        first = next(iter(bad.values()))
        raise InputError(f"{source_name(source)}: none of {len(bad)} pairs can be used; the first: {first}")
    skipped.update(bad)
    return pairs


def readable(items: list[tuple[str, PairPaths]], *, skipped: dict[str, str]) -> list[tuple[str, PairPaths]]:
    """The named pairs whose files decode to their end; the others are noted as reason by path.

    A file cut short would otherwise end a run at its first validation.
    """
    found = []
    for name, pair in tqdm(items, desc="pairs, read once", unit="pair", disable=len(items) < 500, leave=False):
        try:
            pair.load()
        except InputError as error:
            skipped[pair.hr] = str(error)
            continue
        found.append((name, pair))
    return found


def collate_pairs(items: list[tuple[str, Pair]]) -> dict[str, Any]:
    """Named pairs to a batch: hr and lr uint8 (B, 3, H, W) and (B, 3, h, w), stem, set (the names), image.

    Where all pairs were made here, also key int64 (B,) and parameters; where some are repeated, `repeated` (B bools).

    Raises:
        ConfigError: HR images of several sizes.
    """
    shapes = {pair.hr.shape for _, pair in items}
    if len(shapes) > 1:
        sizes = ", ".join(f"{shape[1]}x{shape[0]}" for shape in sorted(shapes))
        raise ConfigError(f"val_batch_size: images of several sizes ({sizes}) in one batch; set it to 1, or val_crop")
    batch: dict[str, Any] = {
        "hr": torch.stack([to_tensor(pair.hr) for _, pair in items]),
        "lr": torch.stack([to_tensor(pair.lr) for _, pair in items]),
        "stem": [pair.stem for _, pair in items],
        "set": [name for name, _ in items],
        "image": [pair.image for _, pair in items],
    }
    if any(pair.repeated for _, pair in items):
        batch["repeated"] = [pair.repeated for _, pair in items]
    parameters = [pair.parameters for _, pair in items]
    if all(drawn is not None for drawn in parameters):
        batch["key"] = torch.tensor([pair.key for _, pair in items])
        batch["parameters"] = type(parameters[0]).concatenate(parameters)
    return batch


class SingleImages(Dataset):
    """LR images that have no HR image: stem and uint8 (3, h, w).

    Args:
        paths: of the files.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[str, Tensor]:
        return Path(self.paths[place]).stem, to_tensor(load_image(self.paths[place]))


def collate_single(items: list[tuple[str, Tensor]]) -> dict[str, Any]:
    """Stems and images of one size to a batch: lr uint8 (B, 3, h, w), stem."""
    return {"lr": torch.stack([image for _, image in items]), "stem": [stem for stem, _ in items]}
