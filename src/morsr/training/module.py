"""The LightningModule of one-step super-resolution with a mixture of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.adapters import MoRConfig, adapter_parameter_groups, load_adapters, read_adapters_header, save_adapters
from morsr.errors import ConfigError, WeightsError
from morsr.estimators import build_estimator, score_statistics
from morsr.functional.quality import psnr_y, ssim_y
from morsr.models.backbone import load_backbone
from morsr.models.generator import GeneratorOutput, OneStepConfig, OneStepGenerator
from morsr.models.loading import find_adapters
from morsr.models.losses import RestorationLoss
from morsr.training.schedules import ScheduleName, learning_rate_factor


class OneStepSRModule(L.LightningModule):
    """Trains the adapters of a one-step generator on pairs of low- and high-resolution images.

    Only the adapters and their router are trained and saved; the base model is named in the checkpoint and read from
    where it came from.

    Args:
        base: a preset ("tiny", "sd21", "sd-turbo"), a local diffusers folder, a hub id, or a list of ids.
        adapters: ranks, experts, router and balance of the mixture.
        estimator: kind of degradation estimator, "frequency", "learned" or "clip".
        estimator_args: settings of that estimator.
        one_step: timestep and parametrization of the UNet call.
        loss: the reconstruction terms and their weights.
        weights: adapters file to start from, to validate or to test. None: `fit` starts afresh; the others take the
            newest adapters among the runs, else the shipped ones.
        lr: learning rate of the ranks.
        router_lr_scale: the router's learning rate over that of the ranks.
        weight_decay: of AdamW.
        betas: of AdamW.
        warmup: steps of linear rise of the learning rates.
        schedule: "constant" (OSEDiff) or "cosine" to zero at the last step.
        calibration_images: degraded images whose mean and deviation standardise what the router sees.

    Raises:
        ConfigError: a setting outside its range.
        WeightsError: base or adapters that cannot be read.
    """

    generator: OneStepGenerator

    def __init__(
        self,
        *,
        base: str | list[str] = "tiny",
        adapters: MoRConfig | None = None,
        estimator: str = "frequency",
        estimator_args: dict[str, Any] | None = None,
        one_step: OneStepConfig | None = None,
        loss: dict[str, float] | None = None,
        weights: str | None = None,
        lr: float = 5e-5,
        router_lr_scale: float = 20.0,
        weight_decay: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int = 0,
        schedule: ScheduleName = "constant",
        calibration_images: int = 1024,
    ) -> None:
        super().__init__()
        if calibration_images < 2:
            raise ConfigError(f"calibration_images: expected at least 2, got {calibration_images}")
        self.adapters, self.one_step = adapters or MoRConfig(), one_step or OneStepConfig()
        self.base = base
        self.estimator_spec: dict[str, Any] = {"kind": estimator, "args": dict(estimator_args or {})}
        self.lr, self.router_lr_scale = lr, router_lr_scale
        self.weight_decay, self.betas = weight_decay, betas
        self.warmup, self.schedule = warmup, schedule
        self.calibration_images = calibration_images
        self.weights_file = weights
        self.last_output: GeneratorOutput | None = None
        self._build_models()
        self.loss = RestorationLoss(**(loss or {}))
        if weights is not None:
            self.load_adapters(weights)

    def _build_models(self) -> None:
        estimator = build_estimator(self.estimator_spec["kind"], **self.estimator_spec["args"])
        self.generator = OneStepGenerator(
            load_backbone(self.base), estimator, adapters=self.adapters, one_step=self.one_step
        )
        self.strict_loading = False  # checkpoints hold the adapters alone; `on_load_checkpoint` checks them

    # -- steps ---------------------------------------------------------------------------------------------------

    def forward(self, lr: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Restore LR images (B, 3, h, w) in [0, 1]; the result is clamped to [0, 1]."""
        return self.generator(lr, size=size).sr.clamp(0, 1)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        context = self.generator.context
        context.noise_sigma = self.adapters.noise_at(self.global_step / max(self._total_steps(), 1))
        output = self.generator(batch["lr"], size=tuple(batch["hr"].shape[-2:]))
        terms = self.loss(output.sr, batch["hr"])
        total = terms.pop("total")
        if self.adapters.is_routed:
            terms["balance"] = context.balance_loss(output.scores.severity)
            total = total + terms["balance"]
        # Detached, so that the callbacks that read it do not keep the step's graph alive.
        routing = output.routing.detach() if output.routing is not None else None
        self.last_output = output._replace(sr=output.sr.detach(), z0=output.z0.detach(), routing=routing)
        values = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(values, batch_size=len(batch["hr"]))
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(batch["hr"]))
        return total

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        sr = self._restore_as_saved(batch)
        count = len(batch["hr"])
        self.log("val/psnr", psnr_y(sr, batch["hr"]).mean(), prog_bar=True, batch_size=count, sync_dist=True)
        self.log("val/ssim", ssim_y(sr, batch["hr"]).mean(), prog_bar=True, batch_size=count, sync_dist=True)
        return {"sr": sr}

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Nothing here: `morsr.evaluation.BenchmarkTable` collects the pairs and runs every row of the table alike."""

    def setup(self, stage: str) -> None:
        if stage == "fit" or self.weights_file is not None or self.trainer.ckpt_path is not None:
            return
        path = self._newest_adapters() or find_adapters("tiny")
        self.load_adapters(path)
        rank_zero_info(f"adapters: {path}")

    def _newest_adapters(self) -> Path | None:
        """The newest file of adapters with this configuration and base among the runs beside this one."""
        runs = Path(self.trainer.log_dir or self.trainer.default_root_dir).parent
        found = sorted(runs.glob("*/adapters*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in found:
            header = read_adapters_header(path)
            same = header["config"] == self.adapters.to_dict() and header["base_id"] == self.generator.backbone.base_id
            if same:
                return path
        return None

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"sr": self(batch["lr"]), "stem": batch.get("stem")}

    def _restore_as_saved(self, batch: Mapping[str, Any]) -> Tensor:
        """Restored images with the values that an 8-bit file would hold, so that scores agree with `morsr score`."""
        sr = self(batch["lr"], size=tuple(batch["hr"].shape[-2:]))
        return (sr * 255).round() / 255

    def _total_steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    # -- optimization --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        groups = adapter_parameter_groups(
            self.generator.backbone, "generator", lr=self.lr, router_lr_scale=self.router_lr_scale
        )
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        factor = learning_rate_factor(self.schedule, warmup=self.warmup, total=self._total_steps())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        context = self.generator.context
        if self.adapters.is_routed and not context.standardized:
            self._calibrate()

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Standardise the router's input by mean and deviation over degraded training images, once."""
        datamodule, estimator = self.trainer.datamodule, self.generator.estimator
        assert estimator is not None

        def degraded() -> Iterator[Tensor]:
            left = self.calibration_images
            for batch in datamodule.train_dataloader():
                moved = datamodule.transfer_batch_to_device(batch, self.device, 0)
                yield datamodule.finish_batch(moved)["lr"]
                left -= len(moved["stem"])
                if left <= 0:
                    return

        mean, deviation = score_statistics(estimator, degraded(), minimum=2)
        self.generator.context.set_standardization(mean, deviation)
        rank_zero_info(f"router input standardised over at least {self.calibration_images} degraded images")

    # -- adapters file and checkpoint ----------------------------------------------------------------------------

    def save_adapters(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write the adapters, their router and everything needed to run them on the same base as one safetensors file.

        Args:
            path: target; written beside it first and moved, so that a stop leaves no half file.
            dtype: what the ranks are stored as; default float32.
        """
        backbone = self.generator.backbone
        save_adapters(path, backbone, name="generator", base_id=backbone.base_id, extra=self._recipe(), dtype=dtype)

    def _recipe(self) -> dict[str, Any]:
        """What a file of adapters needs beside them to be run again."""
        return {"estimator": self.estimator_spec, "one_step": self.one_step.to_dict(), "base": self.base}

    def load_adapters(self, path: str | os.PathLike[str]) -> None:
        """Load adapters of the same configuration over the ones in the module.

        Raises:
            WeightsError: another base, another configuration, or a damaged file; nothing is changed then.
        """
        if not Path(path).is_file():
            raise WeightsError(f"{path}: no such adapters file")
        backbone = self.generator.backbone
        load_adapters(path, backbone, name="generator", base_id=backbone.base_id)

    def _saved_keys(self) -> set[str]:
        """Names of what a checkpoint holds: trainable tensors and the buffers of the adapters' context."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        context = self.generator.context
        inside = {id(tensor) for tensor in (*context.parameters(), *context.buffers())}
        return trainable | {name for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) in inside}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep = self._saved_keys()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in keep}
        checkpoint["morsr"] = {
            "base_id": self.generator.backbone.base_id,
            "adapters": self.adapters.to_dict(),
            "extra": self._recipe(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wanted, found = self._saved_keys(), set(checkpoint["state_dict"])
        base_id = checkpoint.get("morsr", {}).get("base_id")
        if base_id != self.generator.backbone.base_id:
            raise WeightsError(
                f"the checkpoint was trained on the base {base_id!r}, this run uses {self.generator.backbone.base_id!r}"
            )
        if wanted != found:
            odd: Sequence[str] = sorted(wanted ^ found)
            raise WeightsError(
                f"the checkpoint does not fit the configured adapters: {len(wanted - found)} tensors missing and "
                f"{len(found - wanted)} unexpected, such as {odd[0]}"
            )
