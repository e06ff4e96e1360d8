"""Random crops of photographs, and empty places for synthetic images, which the device fills."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from morsr.data.images import ImageList, image_size, load_image
from morsr.data.sampling import PassOrder, stratified_share
from morsr.errors import InputError

_ATTEMPTS = 200  # bad files in a row before the data set counts as unusable


class TrainingImages(Dataset):
    """Crops of HR images; sample number n is place n mod `samples` of epoch n div `samples`.

    A file that cannot be read, or is smaller than the crop, is passed over: the next image of the list takes its place,
    on every worker alike, and the item says which file it was.

    Args:
        images: where the photographs are; may be empty if all samples are synthetic. Both images of a real pair are
            cropped at the same place and neither is shrunk.
        samples: per epoch.
        crop_size: side of the square crop in pixels.
        seed: of the run.
        synthetic: share of samples whose pixels are left at 0 for the device to fill.
        flips, turns: mirror; turn by multiples of 90 degrees.
        max_downscale: photographs are shrunk by a random factor from 1 to this, as far as their size allows.
        decoded: images already in memory, by path.
        scale: HR pixels per LR pixel of the pairs.
    """

    def __init__(
        self,
        images: ImageList,
        *,
        samples: int,
        crop_size: int,
        seed: int,
        synthetic: float = 0.0,
        flips: bool = True,
        turns: bool = True,
        max_downscale: float = 1.0,
        decoded: dict[str, np.ndarray] | None = None,
        scale: int = 4,
    ) -> None:
        self.images, self.samples, self.crop_size, self.seed = images, samples, crop_size, seed
        self.synthetic, self.flips, self.turns, self.max_downscale = synthetic, flips, turns, max_downscale
        self.decoded, self.scale = decoded or {}, scale
        self.order = PassOrder(images.weights, seed) if len(images) else None
        self.photographs = samples - int(stratified_share(samples, synthetic))
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        from morsr.degradation.keys import mix, sample_keys, uniforms

        epochs = np.asarray(numbers) // self.samples
        places = torch.as_tensor(np.asarray(numbers) % self.samples)
        keys = torch.empty(len(numbers), dtype=torch.int64)
        for epoch in np.unique(epochs):
            here = torch.from_numpy(epochs == epoch)
            keys[here] = sample_keys(self.seed, int(epoch), places[here])
        # the degradation draws from the key itself: the crop gets a stream of its own
        draws = uniforms(mix(keys + 1), 6).numpy()
        items = zip(epochs.tolist(), places.tolist(), keys, draws, strict=True)
        return [self._item(epoch, place, key, draw) for epoch, place, key, draw in items]

    def _item(self, epoch: int, place: int, key: Tensor, draw: np.ndarray) -> dict[str, Any]:
        before = int(stratified_share(place, self.synthetic))
        if self.order is None or int(stratified_share(place + 1, self.synthetic)) > before:
            empty = torch.zeros(3, self.crop_size, self.crop_size, dtype=torch.uint8)
            stem = f"dead_leaves_{int(key) & 0xFFFFFFFFFFFFFFFF:016x}"
            return {"hr": empty, "lr": None, "stem": stem, "key": key, "synthetic": True, "skipped": {}}
        first = self.order(epoch * self.photographs + place - before)
        skipped: dict[str, str] = {}
        for attempt in range(min(_ATTEMPTS, len(self.images))):
            chosen = (first + attempt) % len(self.images)
            path = self.images.paths[chosen]
            try:
                crop, partner = self._crop(chosen, draw)
            except InputError as error:
                skipped[path] = self.bad[chosen] = str(error)
                continue
            stem = _stem(path)
            return {"hr": crop, "lr": partner, "stem": stem, "key": key, "synthetic": False, "skipped": skipped}
        raise InputError(
            f"{len(skipped)} training images in a row cannot be used; the last: {list(skipped.values())[-1]}"
        )

    def _crop(self, chosen: int, draw: np.ndarray) -> tuple[Tensor, Tensor | None]:
        if chosen in self.bad:
            raise InputError(self.bad[chosen])
        path = self.images.paths[chosen]
        partner = self.images.partners[chosen] if self.images.partners else None
        image = self.decoded[path] if path in self.decoded else load_image(path)
        height, width = image.shape[:2]
        size = self.crop_size
        check_size(path, width, height, size)
        if partner is not None:
            return self._crop_pair(path, image, partner, draw)
        factor = 1 + draw[0] * (min(self.max_downscale, min(height, width) / size) - 1)
        side = min(round(size * factor), height, width)
        top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
        crop = image[top : top + side, left : left + side]
        if side != size:
            crop = np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC))
        return self._oriented(crop, draw), None

    def _crop_pair(self, path: str, image: np.ndarray, partner: str, draw: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same random place of both images of a pair, at whole LR pixels."""
        small, scale, size = load_image(partner), self.scale, self.crop_size // self.scale
        height, width = small.shape[:2]
        if image.shape[:2] != (scale * height, scale * width):
            raise InputError(f"{path}: {image.shape[1]}x{image.shape[0]} pixels, its LR image has {width}x{height}")
        top, left = int(draw[1] * (height - size + 1)), int(draw[2] * (width - size + 1))
        both = (
            image[scale * top : scale * (top + size), scale * left : scale * (left + size)],
            small[top : top + size, left : left + size],
        )
        hr, lr = (self._oriented(crop, draw) for crop in both)
        return hr, lr

    def _oriented(self, crop: np.ndarray, draw: np.ndarray) -> Tensor:
        if self.flips and draw[3] < 0.5:
            crop = crop[:, ::-1]
        if self.turns:
            crop = np.rot90(crop, int(4 * draw[4]))
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))


def check_size(path: str, width: int, height: int, size: int) -> None:
    """Raise InputError for an image in which no crop of so many pixels fits."""
    if min(width, height) < size:
        raise InputError(f"{path}: {width}x{height} pixels, too small for crops of {size}")


def window_places(keys: Tensor, room: int) -> list[tuple[int, int]]:
    """Top and left of each sample's window, 0 to `room`, from a stream of its own of the sample's key (B,)."""
    from morsr.degradation.keys import mix, uniforms

    places = (uniforms(mix(keys.cpu() + 2), 2) * (room + 1)).long().clamp(max=room)
    return [(int(top), int(left)) for top, left in places.tolist()]


def cut_windows(
    batch: dict[str, Any], windows: Sequence[tuple[int, int]], patch_size: int, scale: int
) -> dict[str, Tensor]:
    """The windows of a batch, hr (B, 3, patch_size, patch_size) and lr, each at its top and left in LR pixels."""
    side = patch_size // scale
    return {
        name: torch.stack([
            image[:, top * factor : (top + side) * factor, left * factor : (left + side) * factor]
            for image, (top, left) in zip(batch[name], windows, strict=True)
        ])
        for name, factor in (("hr", scale), ("lr", 1))
    }  # fmt: skip


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items to a batch: hr uint8 (B, 3, H, W), stem, key int64 (B,), synthetic as the list of their places, skipped.

    Where there are real pairs, also their places as paired, and their LR crops uint8 (n, 3, h, w) as paired_lr.
    """
    skipped: dict[str, str] = {}
    for item in items:
        skipped.update(item["skipped"])
    paired = [place for place, item in enumerate(items) if item["lr"] is not None]
    pairs = {"paired": paired, "paired_lr": torch.stack([items[place]["lr"] for place in paired])} if paired else {}
    return {
        **pairs,
        "hr": torch.stack([item["hr"] for item in items]),
        "stem": [item["stem"] for item in items],
        "key": torch.stack([item["key"] for item in items]),
        "synthetic": [place for place, item in enumerate(items) if item["synthetic"]],
        "skipped": skipped,
    }


def decode_small_set(images: ImageList, *, limit_mb: float, size: int) -> tuple[ImageList, dict[str, np.ndarray], dict]:
    """Decode all images once if that takes at most so many MiB.

    Returns:
        The images that can be used, their pixels by path (empty if the set is too large), and what is wrong with the
        others by path.
    """
    bad: dict[str, str] = {}
    known = (images.sizes > 0).all(1)
    small = known & (images.sizes.min(1, initial=2**31) < size)
    for place in np.flatnonzero(small):
        try:
            check_size(images.paths[place], *images.sizes[place].tolist(), size)  # type: ignore[call-arg]
        except InputError as error:
            bad[images.paths[place]] = str(error)
    images = images.keep(~small)
    # Headers tell how much memory it would be; more files than this are not a small set, whatever their size.
    budget = limit_mb * 2**20
    if budget <= 0 or len(images) > 5000:
        return images, {}, bad
    usable, total, found_by_manifest = np.ones(len(images), bool), 0, dict(bad)
    for place, path in enumerate(images.paths):  # type: ignore[assignment]
        try:
            width, height = image_size(path)
            check_size(path, width, height, size)
            total += 3 * width * height
        except InputError as error:
            usable[place], bad[path] = False, str(error)
        if total > budget:
            return images, {}, found_by_manifest
    decoded: dict[str, np.ndarray] = {}
    for place in np.flatnonzero(usable):
        path = images.paths[place]
        try:
            if path not in decoded:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    decoded[path] = load_image(path)
        except InputError as error:
            usable[place], bad[path] = False, str(error)
    return images.keep(usable), decoded, bad


def _stem(path: str) -> str:
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0]
