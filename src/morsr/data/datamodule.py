"""RealESRGANDataModule: workers decode and crop, the device degrades."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from morsr.data.dataset import EpochSampler, EvaluationImages, ImageLoader, LowQualityImages, TrainingCrops, collate
from morsr.data.dead_leaves import dead_leaves
from morsr.data.sources import Photo, Source, check_names, find_photos, source_name
from morsr.degradation import DegradationRecipe, apply, true_severity
from morsr.degradation.keys import mix, uniforms
from morsr.errors import ConfigError, InputError, MorsrError


class RealESRGANDataModule(L.LightningDataModule):
    """Sharp images in, pairs of LR and HR out, degraded by a recipe with its own parameters for every image.

    What a LightningModule gets:

    | key | what | in |
    |---|---|---|
    | `hr` | float32 (B, 3, H, W) in [0, 1] | all but predict |
    | `lr` | float32 (B, 3, H/scale, W/scale) in [0, 1] | all |
    | `stem` | B names | all |
    | `key` | int64 (B,): what the degradation is drawn by | all but predict |
    | `severity` | float32 (B,) in [0, 1], the true one; NaN for pairs of files | all but predict |
    | `parameters` | DegradationParameters of B images, on the CPU | batches without pairs of files |
    | `score_lr` | LR images (B, 3, h, w) of the whole crops, which `lr` is a window of | training with `patch_size` |
    | `set`, `image` | B names of sources and of photographs | validation, test |
    | `repeated` | B bools: another device counts this image | validation, test |

    Sources are explained in docs/data.md.

    Args:
        train: sources of HR photographs and of pairs; may be empty if dead_leaves is 1.
        val, test: sources, each a set in the tables; photographs are degraded with fixed seeds.
        predict: folders of LR images.
        dead_leaves: share of training samples that are synthetic, rendered on the device.
        recipe: a degradation recipe: a preset's name, a YAML file, a class path or an instance.
        val_recipe: that of validation and test images; None takes the same.
        batch_size: training samples per step and device.
        crop_size: side of HR crops in pixels, a multiple of scale.
        patch_size: side in HR pixels of the window of each degraded crop that becomes hr and lr, at a random place; the
            degradation scores are taken from the whole crop, as they are from a whole image later. None: all of it.
        samples_per_epoch: None takes the number of photographs, but at least 100 batches.
        val_seeds, test_seeds: seeds of the degradations; every photograph is degraded once per seed.
        val_crop: sides of validation images are cropped to at most this many HR pixels.
        val_multiple: sides of degraded validation and test HR images are cropped to multiples of this.
        num_workers: processes that decode and crop; 0 does it in the main process.
        cache_mb: MiB of decoded training photographs that each process keeps.
        seed: of everything random here.
        scale: HR pixels per LR pixel.

    Raises:
        ConfigError: settings that do not fit together; at setup, two validation or two test sources of one name.
        InputError: at setup, no image that can be used.
    """

    def __init__(
        self,
        *,
        train: Sequence[Source] | str = ("skimage:train",),
        val: Sequence[Source] | str = (),
        test: Sequence[Source] | str = ("skimage:eval",),
        predict: Sequence[str] | str = (),
        dead_leaves: ClosedUnitInterval = 0.0,  # type: ignore[assignment]
        recipe: Any = "realesrgan",
        val_recipe: Any = None,
        batch_size: PositiveInt = 16,  # type: ignore[assignment]
        crop_size: PositiveInt = 256,  # type: ignore[assignment]
        patch_size: PositiveInt | None = None,
        samples_per_epoch: PositiveInt | None = None,
        val_seeds: Sequence[int] = (0,),
        test_seeds: Sequence[int] = (0, 1, 2, 3, 4),
        val_crop: PositiveInt | None = None,
        val_multiple: PositiveInt = 64,  # type: ignore[assignment]
        num_workers: NonNegativeInt = 2,  # type: ignore[assignment]
        cache_mb: NonNegativeFloat = 512.0,  # type: ignore[assignment]
        seed: int = 0,
        scale: PositiveInt = 4,  # type: ignore[assignment]
    ) -> None:
        super().__init__()
        self.sources = {
            use: [given] if isinstance(given, str) else list(given)
            for use, given in (("train", train), ("val", val), ("test", test), ("predict", predict))
        }
        self.seeds = {"val": list(val_seeds), "test": list(test_seeds)}
        self.recipe, self.val_recipe = recipe, recipe if val_recipe is None else val_recipe
        self.dead_leaves = dead_leaves
        self.batch_size, self.crop_size, self.patch_size = batch_size, crop_size, patch_size
        self.samples_per_epoch = samples_per_epoch
        self.val_crop, self.val_multiple = val_crop, val_multiple
        self.num_workers, self.cache_mb, self.seed, self.scale = num_workers, cache_mb, seed, scale
        if self.dead_leaves < 1 and not self.sources["train"]:
            raise ConfigError("train: expected at least one source, or dead_leaves: 1.0 for synthetic images alone")
        for name, side in (("crop_size", crop_size), ("val_multiple", val_multiple), ("patch_size", patch_size)):
            if side is not None and (side % scale or side < 16):
                raise ConfigError(f"{name}: expected a multiple of the scale {scale} from 16 on, got {side}")
        if patch_size is not None and patch_size > crop_size:
            raise ConfigError(f"patch_size: expected at most crop_size={crop_size}, got {patch_size}")
        if val_crop is not None and val_crop < val_multiple:
            raise ConfigError(f"val_crop: expected at least val_multiple={val_multiple}, got {val_crop}")
        self.skipped: dict[str, str] = {}  # reason by path of every file that was passed over
        self._training: TrainingCrops | None = None
        self._epoch = 0  # of the next iterator outside a fit
        self._resumed_batches = 0
        self._sets: dict[str, list[Photo]] = {}
        self._degraded: dict[tuple[str, str], Tensor] = {}  # LR images of evaluation, for the next one

    # ------------------------------------------------------------------------------------------------------ set-up

    @classmethod
    def missing(cls, **settings: Any) -> list[str]:
        """What the data of these settings lacks, a line each; files are listed, none is opened.

        Args:
            settings: those of the constructor.
        """
        try:
            data = cls(**settings)
        except MorsrError as error:
            return [f"data: {error}"]
        checks: list[tuple[str, Any, Any]] = [
            *(("recipe", DegradationRecipe.load, one) for one in (data.recipe, data.val_recipe)),
            *((use, find_photos, source) for use in data.sources for source in data._sources(use)),
            *((use, data._photos, use) for use in data.sources),
        ]
        lacks: dict[str, None] = {}  # what two checks find is said once
        for name, work, given in checks:
            try:
                work(given)
            except MorsrError as error:
                lacks[f"data.{name}: {error}"] = None
        return list(lacks)

    def setup(self, stage: str) -> None:
        _ = self._recipes  # a wrong recipe is found now
        self._degraded.clear()  # sets of validation and of test may share their names
        if stage == "fit":
            self._resumed_batches = 0
            photos, wanted = self._photos("train"), self.samples_per_epoch
            at_once = self.batch_size * (self.trainer.world_size if self.trainer is not None else 1)
            if wanted is None:
                wanted = max(round(len(photos) / (1 - self.dead_leaves)) if photos else 0, 100 * at_once)
            self._training = self._training or TrainingCrops(
                photos,
                samples=-(-wanted // at_once) * at_once,
                crop_size=self.crop_size,
                seed=self.seed,
                synthetic=self.dead_leaves,
                cache_mb=self.cache_mb,
                scale=self.scale,
            )
        if stage in ("fit", "validate"):
            self._evaluation_set("val")
        if stage == "test":
            self._evaluation_set("test")
        if stage == "predict" and not self.sources["predict"]:
            raise ConfigError("predict: expected at least one folder of LR images in the data settings")

    def _sources(self, use: str) -> Sequence[Source]:
        """The sources of a use; none where all training images are synthetic."""
        return [] if use == "train" and self.dead_leaves == 1 else self.sources[use]

    def _photos(self, use: str) -> list[Photo]:
        """The images of a use; files are listed, none is opened."""
        sources = self._sources(use)
        if use in ("val", "test"):
            check_names(sources)
        photos = [photo for source in sources for photo in find_photos(source)]
        if use == "train" and sources and not photos:
            raise InputError(f"train: none of the optional sources is there: {sources}")
        return photos

    def _evaluation_set(self, use: str) -> list[Photo]:
        """The images of val or test that can be read: a damaged one is found now, not at the first validation."""
        if use in self._sets:
            return self._sets[use]
        check_names(self.sources[use])
        found: list[Photo] = []
        largest = self.val_crop if use == "val" else None
        for source in self.sources[use]:
            bad: dict[str, str] = {}
            photos = find_photos(source)
            for photo in tqdm(photos, desc="images, read once", disable=len(photos) < 500, leave=False):
                try:
                    photo.read(multiple=self.val_multiple, largest=largest, scale=self.scale)
                    found.append(photo)
                except InputError as error:
                    bad[photo.hr] = str(error)
            if bad and len(bad) == len(photos):
                first = next(iter(bad.values()))
                raise InputError(f"{source_name(source)}: none of {len(bad)} images can be used; the first: {first}")
            self.skipped.update(bad)
        self._sets[use] = found
        return found

    # ----------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader:
        if self._training is None:
            self.setup("fit")
        assert self._training is not None
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        batches = len(self._training) // (self.batch_size * replicas)
        running = self._fits(TrainerStatus.RUNNING)
        if running:  # calibration begins with the epoch that the training does
            self._epoch = 0

        def place() -> tuple[int, int]:
            # A resumed fit may ask for two iterators before its first step.
            if running and self.trainer is not None and self.trainer.train_dataloader is not None:
                return divmod(self._batches_done(), _limited(self.trainer, batches))
            self._epoch += 1
            return self._epoch - 1, 0

        sampler = EpochSampler(batches=batches, batch_size=self.batch_size, place=place, replicas=replicas, rank=rank)
        return ImageLoader(self._training, sampler=sampler, **self._loading(self.batch_size))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return ImageLoader(LowQualityImages(self._photos("predict")), **self._loading(1))

    def _evaluation_loader(self, use: str) -> DataLoader | list[DataLoader]:
        photos = self._evaluation_set(use)
        if photos:
            images = EvaluationImages(
                photos,
                self.seeds[use],
                multiple=self.val_multiple,
                largest=self.val_crop if use == "val" else None,
                scale=self.scale,
                devices=self.trainer.world_size if self.trainer is not None else 1,
            )
            return ImageLoader(images, **self._loading(1))
        if self.trainer is not None and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
            raise InputError(f"data.{use}: expected at least one set of images, got none of {self.sources[use]}")
        return []

    def _loading(self, batch_size: int) -> dict[str, Any]:
        workers = self.num_workers
        return {
            "batch_size": batch_size,
            "collate_fn": collate,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": _start_worker if workers else None,
            "pin_memory": torch.accelerator.is_available(),
        }

    # ------------------------------------------------------------------------------------------------ on the device

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        batch = self._drawn(batch)
        parameters = batch.pop("parameters", None)  # drawn and read on the CPU: no pause of the device
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch if parameters is None else {**batch, "parameters": parameters}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.finish_batch(batch)

    @functools.cached_property
    def _recipes(self) -> tuple[DegradationRecipe, DegradationRecipe]:
        return DegradationRecipe.load(self.recipe), DegradationRecipe.load(self.val_recipe)

    def _drawn(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with all that is made on the CPU: parameters, severity, places of windows, LR images of evaluation.

        The noise of a CPU and of a GPU differ, and scores are to be compared between them.
        """
        if "kind" not in batch or "parameters" in batch:
            return dict(batch)
        evaluated = "set" in batch
        parameters = self._recipes[evaluated].sample(batch["key"])
        severity = true_severity(parameters, scale=self.scale).combined
        severity[_places(batch, "pair")] = torch.nan
        drawn = {**batch, "parameters": parameters, "severity": severity}
        if evaluated:
            for place in _places(batch, "photo"):
                name = (batch["set"][place], batch["stem"][place])
                if name not in self._degraded:
                    hr = batch["hr"][place, None].float().div(255)
                    lr = apply(hr, parameters[place, None], scale=self.scale)
                    self._degraded[name] = lr[0].mul(255).round().byte()
                drawn["lr"][place] = self._degraded[name]
        elif self.patch_size is not None:
            room = (self.crop_size - self.patch_size) // self.scale
            places = uniforms(mix(batch["key"] + 2), 2) * (room + 1)
            drawn["windows"] = places.long().clamp(max=room).tolist()
        return drawn

    @torch.no_grad()
    def finish_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn what a loader gives into what a model gets; Lightning's hook calls it, and so can a loop of your own."""
        batch = self._drawn(batch)
        batch |= {name: batch[name].float().div_(255) for name in ("hr", "lr") if name in batch}
        if "kind" in batch and "set" not in batch:  # of training: synthetic HR images, and all LR images but real ones
            hr, leaves = batch["hr"], _places(batch, "leaves")
            if leaves:
                hr[leaves] = dead_leaves(batch["key"][leaves], hr.shape[-1])
            if made := sorted([*leaves, *_places(batch, "photo")]):
                batch["lr"][made] = apply(hr[made], batch["parameters"][made], scale=self.scale)
        if "pair" in batch.pop("kind", []):
            del batch["parameters"]
        if windows := batch.pop("windows", None):
            batch["score_lr"] = batch["lr"]
            for name, factor in (("hr", self.scale), ("lr", 1)):
                side = self.patch_size // self.scale * factor  # type: ignore[operator]
                batch[name] = torch.stack(
                    [
                        image[:, factor * top : factor * top + side, factor * left : factor * left + side]
                        for image, (top, left) in zip(batch[name], windows, strict=True)
                    ]
                )
        for skipped in batch.pop("skipped", ()):
            self.skipped.update(skipped)
        return batch

    # ------------------------------------------------------------------------------------------ bad files and resume

    def teardown(self, stage: str) -> None:
        new = list(self.skipped.values())
        if new:
            more = f"\n  and {len(new) - 20} more" if len(new) > 20 else ""
            # by each process, which has seen other files
            warnings.warn(f"image files passed over: {len(new)}\n  " + "\n  ".join(new[:20]) + more, stacklevel=2)
        self.skipped.clear()

    def _fits(self, status: TrainerStatus | None = None) -> bool:
        """Whether a trainer fits; it keeps its function afterwards, and its status tells whether it still runs."""
        state = None if self.trainer is None else self.trainer.state
        return state is not None and state.fn == TrainerFn.FITTING and status in (None, state.status)

    def _batches_done(self) -> int:
        """Training batches that are behind us, by the checkpoint that was loaded or by the trainer's own count.

        Processed batches are counted, which is right wherever the checkpoint was written: after a step, after
        validation, or when the run was stopped within a step. The checkpoint's number is kept here because Lightning
        may ask for the loader before it restores its own.
        """
        if self.trainer is None or not self._fits():
            return 0
        return max(self._resumed_batches, self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches_done()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fits():
            self._resumed_batches = state_dict.get("batches", 0)


def _places(batch: dict[str, Any], kind: str) -> list[int]:
    return [place for place, found in enumerate(batch["kind"]) if found == kind]


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # a SIGTERM to the run's whole group, as by `timeout`, leaves the data of its last step


def _limited(trainer: Any, batches: int) -> int:
    """Batches per epoch that the trainer's limit_train_batches leaves, at least 1."""
    limit = trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(1, batches)
