"""Crops for training and whole images for evaluation, each a pure function of its number.

Nothing here has a state that workers could advance differently: a sample depends on (seed, epoch, place in the epoch),
so that any number of workers gives the same samples, and a resumed run starts at the sample where it stopped.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from morsr.data.sources import SCALE, Photo, check_scale
from morsr.degradation.keys import mix, sample_keys, uniforms
from morsr.errors import InputError, MorsrError
from morsr.imaging import read_rgb

_ATTEMPTS = 200  # bad files in a row before the data set counts as unusable


def synthetic_before(place: int, share: float) -> int:
    """How many of the samples before a place are synthetic, spread evenly: any run of n holds share * n of them, ±1."""
    return math.floor(place * share + 1e-9)


class PassOrder:
    """A shuffled order of the images for every pass over them; with equal weights each image comes once per pass.

    With other weights image i comes n w_i / sum(w) times per pass, rounded up or down at random (systematic resampling,
    the draw of least variance with the right expectation).

    Args:
        weights: float (n,), above 0.
        seed: of the run.
    """

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        self.seed = seed
        self._edges = np.cumsum(weights / weights.sum()) * len(weights)
        self._edges[-1] = len(weights)
        self._passes: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> int:
        """Number of the image at a position of the endless sequence of passes."""
        count = len(self._edges)
        number, place = divmod(position, count)
        if number not in self._passes:
            generator = np.random.default_rng([self.seed % 2**64, number])
            points = np.arange(count) + generator.uniform()
            if len(self._passes) > 1:  # two may be in use, where one ends and the next begins
                del self._passes[min(self._passes)]
            self._passes[number] = generator.permutation(np.searchsorted(self._edges, points, side="right"))
        return int(min(self._passes[number][place], count - 1))


class EpochSampler(DistributedSampler):
    """Yields sample numbers, epoch * samples_per_epoch + place.

    Devices get whole batches in turn. It is a DistributedSampler so that Lightning does not replace it.

    Args:
        batches: per epoch and device.
        batch_size: samples per batch and device.
        place: asked by every new iterator for its epoch, and the batches of it to pass over.
        replicas, rank: number of devices, and which one this is.
    """

    def __init__(
        self, *, batches: int, batch_size: int, place: Callable[[], tuple[int, int]], replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(range(batches), num_replicas=replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.batches, self.batch_size, self.place = batches, batch_size, place

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        epoch, start = self.place()
        for batch in range(start, self.batches):
            first = ((epoch * self.batches + batch) * self.num_replicas + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)


class TrainingCrops(Dataset):
    """Random crops of photographs and pairs, and empty places for synthetic images, which the device fills.

    A file that cannot be read, or is smaller than the crop, is passed over: the next one takes its place, on every
    worker alike, and the item says which file it was. Both images of a pair are cropped at the same place.

    Args:
        photos: may be empty if all samples are synthetic.
        samples: per epoch, over all devices.
        synthetic: share of samples that are synthetic, in [0, 1].
        crop_size, seed, cache_mb, scale: see `RealESRGANDataModule`.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        *,
        samples: int,
        crop_size: int,
        seed: int,
        synthetic: float = 0.0,
        cache_mb: float = 0.0,
        scale: int = SCALE,
    ) -> None:
        self.photos, self.samples, self.crop_size, self.seed = photos, samples, crop_size, seed
        self.synthetic, self.scale, self.room = synthetic, scale, cache_mb * 2**20
        self.order = PassOrder(np.array([photo.weight for photo in photos]), seed) if photos else None
        self.bad: dict[int, str] = {}
        self._kept: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, self.samples)
        [key] = sample_keys(self.seed, epoch, torch.tensor([place]))
        item: dict[str, Any] = {"key": key, "skipped": {}}
        before = synthetic_before(place, self.synthetic)
        if self.order is None or synthetic_before(place + 1, self.synthetic) > before:
            stem = f"dead_leaves_{int(key) & 0xFFFFFFFFFFFFFFFF:016x}"
            return {**item, **self._crops(np.zeros((self.crop_size, self.crop_size, 3), np.uint8)),
                    "stem": stem, "kind": "leaves"}  # fmt: skip
        draw = uniforms(mix(key[None] + 1), 6)[0].tolist()  # the degradation draws from the key itself
        photographs = self.samples - synthetic_before(self.samples, self.synthetic)
        first = self.order(epoch * photographs + place - before)
        for attempt in range(min(_ATTEMPTS, len(self.photos))):
            chosen = (first + attempt) % len(self.photos)
            photo = self.photos[chosen]
            try:
                crops = self._crop(chosen, photo, draw)
            except InputError as error:
                item["skipped"][photo.hr] = self.bad[chosen] = str(error)
                continue
            return {**item, **crops, "stem": photo.stem, "kind": "photo" if photo.lr is None else "pair"}
        raise InputError(f"no training image can be used; the last: {self.bad[chosen]}")

    def _crop(self, chosen: int, photo: Photo, draw: list[float]) -> dict[str, Tensor]:
        if chosen in self.bad:
            raise InputError(self.bad[chosen])
        image, size = self._read(photo.hr), self.crop_size
        height, width = image.shape[:2]
        if min(height, width) < size:
            raise InputError(f"{photo.hr}: {width}x{height} pixels, too small for crops of {size}")
        if photo.lr is None:
            top, left = int(draw[1] * (height - size + 1)), int(draw[2] * (width - size + 1))
            return self._crops(image[top : top + size, left : left + size], draw=draw)
        small, scale = self._read(photo.lr), self.scale
        check_scale(photo.hr, image, small, scale)
        top = int(draw[1] * (small.shape[0] - size // scale + 1))
        left = int(draw[2] * (small.shape[1] - size // scale + 1))
        crop = image[scale * top : scale * top + size, scale * left : scale * left + size]
        return self._crops(crop, small[top : top + size // scale, left : left + size // scale], draw=draw)

    def _read(self, path: str) -> np.ndarray:
        image = self._kept.get(path)
        if image is None:
            image = read_rgb(path)
            if self.room >= image.nbytes:
                self.room -= image.nbytes
                self._kept[path] = image
        return image

    def _crops(
        self, hr: np.ndarray, lr: np.ndarray | None = None, *, draw: list[float] | None = None
    ) -> dict[str, Tensor]:
        if lr is None:
            lr = np.zeros((self.crop_size // self.scale, self.crop_size // self.scale, 3), np.uint8)
        if draw is not None:
            if draw[3] < 0.5:
                hr, lr = hr[:, ::-1], lr[:, ::-1]
            hr, lr = np.rot90(hr, int(4 * draw[4])), np.rot90(lr, int(4 * draw[4]))
        return {"hr": to_tensor(hr), "lr": to_tensor(lr)}


class EvaluationImages(Dataset):
    """Whole images for validation and tests, each photograph once per seed.

    Args:
        photos: of all sources.
        seeds: of the degradations; a pair of files comes once.
        multiple, largest, scale: see `Photo.read`.
        devices: how many share the set. All must see as many images, since they exchange something after every batch;
            where that takes more images than there are, the first come again, marked as repeated.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        seeds: Sequence[int],
        *,
        multiple: int,
        largest: int | None = None,
        scale: int = SCALE,
        devices: int = 1,
    ) -> None:
        self.items = [(photo, seed) for photo in photos for seed in (seeds if photo.lr is None else (0,))]
        self.several, self.multiple, self.largest = len(seeds) > 1, multiple, largest
        self.scale, self.devices = scale, devices

    def __len__(self) -> int:
        return math.ceil(len(self.items) / self.devices) * self.devices

    def __getitem__(self, place: int) -> dict[str, Any]:
        photo, seed = self.items[place % len(self.items)]
        hr, lr = photo.read(multiple=self.multiple, largest=self.largest, scale=self.scale)
        small = np.zeros((hr.shape[0] // self.scale, hr.shape[1] // self.scale, 3), np.uint8) if lr is None else lr
        return {
            "hr": to_tensor(hr),
            "lr": to_tensor(small),
            "key": torch.tensor(image_key(photo.stem, seed)),
            "stem": f"{photo.stem}_s{seed}" if self.several and lr is None else photo.stem,
            "image": photo.stem,
            "set": photo.source,
            "kind": "photo" if lr is None else "pair",
            "repeated": place >= len(self.items),
        }


class LowQualityImages(Dataset):
    """LR images that have no HR image, for `trainer.predict`."""

    def __init__(self, photos: Sequence[Photo]) -> None:
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"lr": to_tensor(read_rgb(self.photos[place].hr)), "stem": self.photos[place].stem}


class ImageLoader(DataLoader):
    """A DataLoader that raises an error of the data set in a worker as if it had been read in this process.

    Its state is empty, since the data module places the sampler where a run resumes within an epoch.
    """

    def __iter__(self) -> Any:
        return _read(super().__iter__())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _read(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except MorsrError as error:
        # torch puts the worker's traceback before the message
        words = re.split(r"^morsr\.errors\.\w+: ", str(error), flags=re.MULTILINE)[-1]
        raise type(error)(words.strip()) from error


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items to a batch: tensors are stacked, everything else is listed."""
    batch = {name: [item[name] for item in items] for name in items[0]}
    return {name: torch.stack(part) if isinstance(part[0], Tensor) else part for name, part in batch.items()}


def image_key(stem: str, seed: int) -> int:
    """Key of the degradation of an image: depends on its name and a seed, not on the images around it."""
    name = stem.encode("utf-8", "surrogateescape")  # the bytes of names that are no UTF-8
    number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)
    return int(sample_keys(seed, 0, torch.tensor([number]))[0])


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to uint8 (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
