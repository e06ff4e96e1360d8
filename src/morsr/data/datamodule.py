"""RealESRGANDataModule: workers decode and crop, the device degrades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from morsr.data.dead_leaves import dead_leaves
from morsr.data.degraded import DegradedImage, apply_recipe, degraded_images, load_recipe
from morsr.data.evaluation_set import PairedImages, SingleImages, collate_pairs, collate_single, pairs_of
from morsr.data.images import ImageList, is_paired, list_images
from morsr.data.loading import ImageLoader, TrainingLoader, worker_seed
from morsr.data.pairs import PairPaths, check_names, paired_source, source_name
from morsr.data.sampling import EpochSampler, epoch_batches, fit_runs, limited_batches
from morsr.data.training_set import TrainingImages, collate, cut_windows, decode_small_set, window_places
from morsr.errors import ConfigError, InputError

_SETTINGS = ("seed", "batch_size", "crop_size", "patch_size", "max_downscale", "usm", "flips", "turns", "scale")


class RealESRGANDataModule(L.LightningDataModule):
    """Sharp images in, pairs of LR and HR out, degraded by a recipe with its own parameters for every image.

    A training batch, as a LightningModule gets it: hr (B, 3, H, W) and lr (B, 3, H/4, W/4) float32 in [0, 1], stem
    (list of B names), key (B,) int64, parameters (DegradationParameters, on the CPU), and with `patch_size` context,
    the LR images (B, 3, H/4, W/4) of whole crops, beside smaller hr and lr. A validation or test batch has
    the same entries and `set`, the name of each image's source, and `image`, its photograph; pairs read from folders
    have no key and no parameters, and neither has a training batch with real pairs in it.

    Sources are explained in morsr/data/images.py and docs/data.md.

    Args:
        train: sources of HR images, and paired folders {lr, hr, name, optional}, whose LR images are taken as they are;
            may be empty if dead_leaves is 1.
        val, test: sources of HR images, degraded with fixed seeds, or paired folders {lr, hr, name, optional}; a pair
            of folders marked optional is left out where it is missing.
        predict: folders of LR images.
        dead_leaves: share of training samples that are synthetic, rendered on the device.
        recipe: name of a degradation recipe, or a YAML file.
        val_recipe: that of the validation and test images; None takes the same.
        engine: "device", our batched operators; "basicsr", the reference ones; None, what the recipe says.
        batch_size: training samples per step and device.
        crop_size: side of HR crops in pixels, a multiple of scale.
        patch_size: side in HR pixels of the window of each degraded crop that becomes hr and lr, at a random place; the
            degradation scores are taken from the whole crop, as they are from a whole image later. None: all of it.
        samples_per_epoch: None takes the number of photographs, but at least 100 batches.
        flips, turns: random mirroring; random turns by 90 degrees.
        max_downscale: HR photographs are shrunk by a random factor from 1 to this; JPEG artefacts of the photographs
            themselves shrink with them.
        usm: sharpen the HR images first, as Real-ESRGAN does; they are then the target too.
        val_seeds, test_seeds: seeds of the degradations; every image is degraded once per seed.
        val_crop: sides of validation images, of pairs too, are cropped to at most this many HR pixels.
        val_multiple: sides of validation and test HR images are cropped to multiples of this.
        val_batch_size: above 1, all validation images must come out at one size.
        num_workers: processes that decode and crop; 0 does it in the main process.
        cache_mb: training sets that take at most so many MiB decoded are kept in memory.
        cache_dir: where degraded validation images are kept; None takes the user's cache folder.
        seed: of everything random here.
        scale: HR pixels per LR pixel.

    Raises:
        ConfigError: a setting out of range or without effect; at setup, two validation or two test sources of one name.
    """

    def __init__(
        self,
        *,
        train: Sequence[str | dict[str, Any]] = ("skimage:train",),
        val: Sequence[str | dict[str, Any]] = (),
        test: Sequence[str | dict[str, Any]] = ("skimage:eval",),
        predict: Sequence[str] = (),
        dead_leaves: float = 0.0,
        recipe: str = "realesrgan",
        val_recipe: str | None = None,
        engine: Literal["device", "basicsr"] | None = None,
        batch_size: int = 16,
        crop_size: int = 256,
        patch_size: int | None = None,
        samples_per_epoch: int | None = None,
        flips: bool = True,
        turns: bool = True,
        max_downscale: float = 1.0,
        usm: bool = False,
        val_seeds: Sequence[int] = (0,),
        test_seeds: Sequence[int] = (0, 1, 2, 3, 4),
        val_crop: int | None = None,
        val_multiple: int = 64,
        val_batch_size: int = 1,
        num_workers: int = 2,
        cache_mb: float = 512.0,
        cache_dir: str | None = None,
        seed: int = 0,
        scale: int = 4,
    ) -> None:
        super().__init__()
        _at_least(1, batch_size=batch_size, val_batch_size=val_batch_size, scale=scale, max_downscale=max_downscale)
        _at_least(1, crop_size=crop_size, samples_per_epoch=samples_per_epoch, val_crop=val_crop)
        _at_least(0, num_workers=num_workers, cache_mb=cache_mb)
        if not 0 <= dead_leaves <= 1:
            raise ConfigError(f"dead_leaves: expected a share in [0, 1], got {dead_leaves}")
        if dead_leaves < 1 and not train:
            raise ConfigError("train: expected at least one source, or dead_leaves: 1.0 for synthetic images alone")
        if crop_size % scale or val_multiple % scale or val_multiple < 1 or crop_size < 16:
            raise ConfigError(
                f"crop_size and val_multiple: expected multiples of the scale {scale} and crops of at least 16, "
                f"got {crop_size} and {val_multiple}"
            )
        if patch_size is not None and not (16 <= patch_size <= crop_size and patch_size % scale == 0):
            raise ConfigError(
                f"patch_size: expected a multiple of the scale {scale} from 16 to crop_size={crop_size}, "
                f"got {patch_size}"
            )
        if val_crop is not None and val_crop < val_multiple:
            raise ConfigError(f"val_crop: expected at least val_multiple ({val_multiple}), got {val_crop}")
        for name, seeds in (("val_seeds", val_seeds), ("test_seeds", test_seeds)):
            if len(set(seeds)) != len(list(seeds)) or not list(seeds):
                raise ConfigError(f"{name}: expected different whole numbers, got {list(seeds)}")
        if not all(isinstance(sources, list | tuple) for sources in (train, val, test, predict)):
            raise ConfigError("train, val, test and predict are lists of sources: write [source], and [] for none")
        self.train, self.val, self.test, self.predict = list(train), list(val), list(test), list(predict)
        self.synthetic, self.recipe, self.engine = dead_leaves, recipe, engine
        self.val_recipe = val_recipe or recipe
        self.batch_size, self.crop_size, self.samples_per_epoch = batch_size, crop_size, samples_per_epoch
        self.patch_size = patch_size
        self.flips, self.turns, self.max_downscale, self.usm = flips, turns, max_downscale, usm
        self.seeds = {"validate": list(val_seeds), "test": list(test_seeds)}
        self.val_crop, self.val_multiple, self.val_batch_size = val_crop, val_multiple, val_batch_size
        self.num_workers, self.cache_mb, self.cache_dir = num_workers, cache_mb, cache_dir
        self.seed, self.scale = seed, scale
        self.skipped: dict[str, str] = {}
        self._recipe: Any = None
        self._training: TrainingImages | None = None
        self._sampler: EpochSampler | None = None
        self._resumed_batches = 0
        self._named: set[str] = set()
        self._sets: dict[str, list[tuple[str, DegradedImage | PairPaths]]] = {}

    # ------------------------------------------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        if self._recipe is None:
            loaded = load_recipe(self.recipe, self.engine)
            # sharpened targets need no second sharpening within the degradation
            self._recipe = replace(loaded, sharpen=False) if self.usm else loaded
        if stage == "fit":
            self._resumed_batches = 0
            self._training = self._training or self._training_set()
        if stage in ("fit", "validate"):
            self._prepare("validate", self.val)
        if stage == "test":
            self._prepare("test", self.test)
        if stage == "predict" and not self.predict:
            raise ConfigError("predict: expected at least one folder of LR images in the data settings")

    def _training_set(self) -> TrainingImages:
        lists = []
        for source in self.train if self.synthetic < 1 else []:
            if not is_paired(source):
                lists.append(list_images(source))
                continue
            found = paired_source(source, scale=self.scale, skipped=self.skipped)  # type: ignore[arg-type]
            hr, lr = [pair.hr for _, pair in found], [pair.lr for _, pair in found]
            lists.append(ImageList.of(hr, source_name(source), partners=lr))
        images = ImageList.join(lists)
        if self.synthetic < 1 and not len(images):
            reason = next(iter(self.skipped.values()), None)
            raise InputError(
                f"no training image can be used; the first: {reason}"
                if reason
                else f"train: none of the optional sources is there: {self.train}"
            )
        decoded: dict[str, Any] = {}
        if len(images):
            images, decoded, bad = decode_small_set(images, limit_mb=self.cache_mb, size=self.crop_size)
            self.skipped.update(bad)
            if not len(images):
                raise InputError(f"no training image can be used; the first: {next(iter(bad.values()))}")
        wanted = self.samples_per_epoch
        if wanted is None:
            photographs = len(images) / (1 - self.synthetic) if len(images) else 0
            wanted = max(round(photographs), 100 * self.batch_size)
        replicas = self.trainer.world_size if self.trainer is not None else 1
        return TrainingImages(
            images,
            samples=epoch_batches(wanted, self.batch_size, replicas) * self.batch_size * replicas,
            crop_size=self.crop_size,
            seed=self.seed,
            synthetic=self.synthetic,
            flips=self.flips,
            turns=self.turns,
            max_downscale=self.max_downscale,
            decoded=decoded,
            scale=self.scale,
        )

    def manifest(self) -> dict[str, Any]:
        """What the data of a run is, as plain values for its card: sources, number and digest of the images, recipe."""
        train: dict[str, Any] = {"sources": self.train, "synthetic": self.synthetic}
        if self._training is not None:
            train |= {"images": len(self._training.images), "digest": self._training.images.digest()}
        sets = {"validate": self.val, "test": self.test}
        recipe = {"name": self.recipe, "hash": self._recipe.hash if self._recipe is not None else None}
        recipe |= {} if self.val_recipe == self.recipe else {"validation": self.val_recipe}
        return {"train": train, **sets, "recipe": recipe, "seed": self.seed, "crop_size": self.crop_size}

    def _prepare(self, stage: str, sources: Sequence[str | dict[str, Any]]) -> None:
        if stage in self._sets:
            return
        check_names(sources)
        found: list[tuple[str, DegradedImage | PairPaths]] = []
        largest = self.val_crop if stage == "validate" else None
        for source in sources:
            if is_paired(source):
                pairs = pairs_of(source, scale=self.scale, skipped=self.skipped)  # type: ignore[arg-type]
                found += [(name, pair._replace(largest=largest and largest // self.scale)) for name, pair in pairs]
                continue
            bad: dict[str, str] = {}
            made = degraded_images(
                [source],
                self.seeds[stage],
                load_recipe(self.val_recipe, self.engine),
                multiple=self.val_multiple,
                largest=largest,
                scale=self.scale,
                cache_dir=self.cache_dir,
                skipped=bad,
            )
            self.skipped.update(bad)
            found += [(source_name(source), pair) for pair in made]
        self._sets[stage] = found

    # ----------------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader:
        if self._training is None:
            self.setup("fit")
        assert self._training is not None
        replicas, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        batches = len(self._training) // (self.batch_size * replicas)
        epoch, start = divmod(self._batches_done(), limited_batches(self.trainer, batches))
        if not fit_runs(self.trainer):  # a loop of one's own may ask for a new loader at every epoch
            epoch, start = self._sampler.next_epoch if self._sampler is not None else 0, 0
        self._sampler = EpochSampler(
            batches=batches, batch_size=self.batch_size, epoch=epoch, start=start, replicas=replicas, rank=rank
        )
        settings = self._loading(self.batch_size)
        return TrainingLoader(self._training, sampler=self._sampler, collate_fn=collate, **settings)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._pair_loader("validate", self.val)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._pair_loader("test", self.test)

    def predict_dataloader(self) -> DataLoader:
        paths = [path for folder in self.predict for path in list_images(folder).paths]
        return ImageLoader(SingleImages(paths), collate_fn=collate_single, **self._loading(1))

    def _pair_loader(self, stage: str, sources: Sequence[str | dict[str, Any]]) -> DataLoader | list[DataLoader]:
        self._prepare(stage, sources)
        trainer = self.trainer
        pairs = PairedImages(self._sets[stage], devices=trainer.world_size if trainer is not None else 1)
        if not len(pairs):
            if trainer is not None and trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                setting = f"data.{'val' if stage == 'validate' else stage}"
                raise InputError(f"{setting}: expected at least one set of images to {stage}, got none of {sources}")
            return []
        return ImageLoader(pairs, collate_fn=collate_pairs, **self._loading(self.val_batch_size))

    def _loading(self, batch_size: int) -> dict[str, Any]:
        workers = self.num_workers
        return {
            "batch_size": batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": worker_seed if workers else None,
            "pin_memory": torch.accelerator.is_available(),
        }

    # ------------------------------------------------------------------------------------------------ on the device

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        # The parameters are drawn and read on the CPU: no transfer, and no pause of the device.
        parameters = batch.pop("parameters", None)
        if parameters is None and "synthetic" in batch and "paired" not in batch:
            parameters = self._recipe.sample(batch["key"])
        if self.patch_size is not None and "synthetic" in batch:
            batch["windows"] = window_places(batch["key"], (self.crop_size - self.patch_size) // self.scale)
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch if parameters is None else {**batch, "parameters": parameters}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.finish_batch(batch)

    @torch.no_grad()
    def finish_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn what a loader gives into what a model gets; Lightning's hook calls it, and so can a loop of your own."""
        batch = dict(batch)
        for name in ("hr", "lr"):
            if name in batch and batch[name].dtype == torch.uint8:
                batch[name] = batch[name].to(torch.float32).div_(255)
        return batch if "synthetic" not in batch else self._in_windows(self._degraded(batch))

    def _in_windows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut every image to its window of patch_size; the whole LR crops go along as the context of the scores."""
        windows = batch.pop("windows", None)
        if self.patch_size is None:
            return batch
        if windows is None:
            windows = window_places(batch["key"], (self.crop_size - self.patch_size) // self.scale)
        return {**batch, **cut_windows(batch, windows, self.patch_size, self.scale), "context": batch["lr"]}

    def _degraded(self, batch: dict[str, Any]) -> dict[str, Any]:
        hr, places = batch["hr"], batch.pop("synthetic")
        self.skipped.update(batch.pop("skipped"))
        if places:
            keys = batch["key"][places]
            hr[places] = dead_leaves(len(places), hr.shape[-1], keys=keys, device=hr.device)
        paired, given = batch.pop("paired", []), batch.pop("paired_lr", None)
        if self.usm:
            from morsr.functional.corrupt import unsharp_mask

            sharp = unsharp_mask(hr)
            sharp[paired] = hr[paired]  # real pairs stay as they were taken
            hr = sharp
        batch["hr"] = hr
        if len(paired) == len(hr) and given is not None:
            return {**batch, "lr": given.to(torch.float32) / 255}
        parameters = batch.get("parameters")
        if parameters is None:
            parameters = self._recipe.sample(batch["key"])
        batch["lr"] = apply_recipe(hr, parameters, self._recipe, scale=self.scale)
        if given is None:
            return {**batch, "parameters": parameters}
        batch["lr"][paired] = given.to(torch.float32) / 255
        return batch

    # ------------------------------------------------------------------------------------------ bad files and resume

    def teardown(self, stage: str) -> None:
        new = [reason for path, reason in self.skipped.items() if path not in self._named]
        if new:
            more = f"\n  and {len(new) - 20} more" if len(new) > 20 else ""
            verb = "image file was" if len(new) == 1 else "image files were"
            rank_zero_warn(f"{len(new)} {verb} passed over:\n  " + "\n  ".join(new[:20]) + more)
        self._named.update(self.skipped)

    def _batches_done(self) -> int:
        """Training batches that are behind us, by the checkpoint that was loaded or by the trainer's own count.

        Processed batches are counted, which is right wherever the checkpoint was written: after a step, after
        validation, or when the run was stopped within a step. The checkpoint's number is kept here because Lightning
        may ask for the loader before it restores its own.
        """
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return 0
        return max(self._resumed_batches, self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in _SETTINGS},
            "dead_leaves": self.synthetic,
            "recipe": self._recipe.hash if self._recipe is not None else None,
            "images": self._training.images.digest() if self._training is not None else None,
            "samples": len(self._training) if self._training is not None else None,
            "devices": self.trainer.world_size if self.trainer is not None else 1,
            "batches": self._batches_done(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumed_batches = state_dict.get("batches", 0)
        now = self.state_dict()
        changed = [
            f"{name} {state_dict[name]} -> {now[name]}"
            for name in now
            if name != "batches" and name in state_dict and state_dict[name] != now[name]
        ]
        if changed:
            rank_zero_warn(f"samples will differ from those of the run before: {', '.join(changed)}")


def _at_least(least: float, **settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not value >= least:
            raise ConfigError(f"{name}: expected at least {least}, got {value}")
