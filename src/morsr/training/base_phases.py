"""Training of a small base from nothing: its autoencoder, then its diffusion UNet.

The shipped `tiny` base is made by these modules; a pretrained Stable Diffusion needs none of them. All random numbers
come from torch's global generator, which is seeded for every batch, so a resumed run equals a straight one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from morsr.functional.diffusion import add_noise
from morsr.models.bases import Base, Condition, build_base, load_base
from morsr.training.callbacks.adapters import averaged
from morsr.training.optim import ScheduleName, learning_rate_factor, total_steps

LATENT_NOISE = 0.05  # standard deviation of the noise on the latents, relative to theirs
LATENT_PENALTY = 1e-3  # weight of the mean square of the latents
UNCONDITIONAL = 0.1  # share of sharp images that are given the "degraded" embedding


class SeededTraining(L.LightningModule):
    """A module trained by AdamW whose random numbers depend on seed, epoch, batch and process alone.

    Args:
        out: file or folder of the result, written at the end.
        lr: peak learning rate.
        weight_decay: of AdamW.
        warmup: steps of linear rise.
        schedule: "constant" or "cosine".
        seed: of what a training step draws.
    """

    waiting = 0  # steps before the schedule starts

    def __init__(
        self,
        *,
        out: str,
        lr: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.0,
        warmup: NonNegativeInt = 0,
        schedule: ScheduleName = "cosine",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.out = Path(out)
        self.lr, self.weight_decay, self.warmup, self.schedule, self.seed = lr, weight_decay, warmup, schedule, seed

    def trained(self) -> list[dict[str, Any]]:
        """Groups of the parameters that are trained."""
        raise NotImplementedError

    def write(self) -> None:
        """Write the result of the training."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._draw_anew(f"train {self.current_epoch} {batch_idx}")

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._draw_anew(f"val {dataloader_idx} {batch_idx}")

    def _draw_anew(self, key: str) -> None:
        torch.manual_seed(zlib.crc32(f"{self.seed} {self.global_rank} {key}".encode()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.trained(), lr=self.lr, weight_decay=self.weight_decay)
        factor = learning_rate_factor(self.schedule, warmup=self.warmup, total=total_steps(self.trainer) - self.waiting)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(max(0, step - self.waiting)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            with averaged(self.trainer, self):
                self.write()


class BasePhase(SeededTraining):
    """A phase of a base, written as a folder in diffusers' layout."""

    base: Any

    def build(self) -> tuple[Base, nn.Module]:
        """Make or read the base; returns it and the part that is trained."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Build the base, unless that has been done; Lightning calls it before it trains."""
        if "base" in self._modules:
            return
        with torch.device("cpu"):  # where the start is the same for every device
            base, trained = self.build()
            base.requires_grad_(False)
            trained.requires_grad_(True)
            self.base = base.to(memory_format=torch.channels_last)

    def write(self) -> None:
        self.base.save(self.out)
        rank_zero_info(f"base model written to {self.out}")


def some_enlarged(images: Tensor) -> Tensor:
    """Images (B, 3, H, W), half of them shrunk and enlarged four times, as a one-step generator encodes them."""
    small = F.interpolate(images, scale_factor=0.25, mode="area")
    enlarged = F.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(0, 1)
    chosen = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), enlarged, images)


class AutoencoderTraining(BasePhase):
    """Trains the autoencoder of a new base on sharp images.

    The loss is the L1 between image and reconstruction and between their differences of neighbouring pixels, and a
    small penalty that keeps the latents within the range that the decoder of AutoencoderTiny accepts (it squashes at
    ±3). Noise on the latents keeps the small errors of a one-step UNet small in the picture. At the end the scaling
    factor is set to one over the standard deviation of the latents.

    Args:
        unet: settings of the UNet2DConditionModel that will be trained next; only stored here.
        vae: settings of the autoencoder.
        base_id: name that adapters record as their base.
        settings: `out`, and those of the optimizer and the seed, see `SeededTraining`.
    """

    def __init__(self, *, unet: dict[str, Any], vae: dict[str, Any], base_id: str = "custom", **settings: Any) -> None:
        super().__init__(**settings)
        self.shapes: dict[str, Any] = {"unet": unet, "vae": vae, "base_id": base_id}
        self.register_buffer("latent_square", torch.ones(()))

    def build(self) -> tuple[Base, nn.Module]:
        base = build_base(**self.shapes)
        return base, base.vae

    def trained(self) -> list[dict[str, Any]]:
        return [{"params": list(self.base.vae.parameters())}]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        images = some_enlarged(batch["hr"]) * 2 - 1
        latents = self.base.encode(images)
        square = latents.float().square().mean()
        self.latent_square.lerp_(square.detach(), 0.01)
        noise = LATENT_NOISE * square.detach().sqrt() * torch.randn_like(latents)
        error = self.base.decode(latents + noise) - images
        reconstruction, edges = error.abs().mean(), error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        self.log("train/reconstruction", reconstruction, prog_bar=True)
        self.log("train/latent_deviation", self.latent_square.sqrt())
        return reconstruction + edges + LATENT_PENALTY * square

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        images = batch["hr"]
        decoded = self.base.decode(self.base.encode(images * 2 - 1)) / 2 + 0.5
        error = (decoded.clamp(0, 1) - images).square().mean((1, 2, 3))
        self.log("val/psnr", (-10 * error.log10()).mean(), prog_bar=True, batch_size=len(images), sync_dist=True)

    def write(self) -> None:
        self.base.vae.register_to_config(scaling_factor=self.base.scaling_factor / float(self.latent_square.sqrt()))
        super().write()


class DiffusionTraining(BasePhase):
    """Trains the diffusion UNet and the two prompt embeddings of a base whose autoencoder is finished.

    Half of the latents are those of sharp images, half those of degraded images enlarged by bicubic interpolation,
    each with its own embedding; some sharp ones get the "degraded" embedding too, so that it serves as the
    unconditional side of classifier-free guidance. Three quarters of the timesteps are of the lower half, where a
    one-step generator starts.

    Args:
        base: folder written by `AutoencoderTraining`.
        settings: `out`, and those of the optimizer and the seed, see `SeededTraining`.
    """

    def __init__(self, *, base: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.base_source = base

    def build(self) -> tuple[Base, nn.Module]:
        base: Any = load_base(self.base_source)
        self.prompts = nn.ParameterDict({side: base.condition(side).tokens.clone() for side in ("clean", "degraded")})
        return base, base.unet

    def trained(self) -> list[dict[str, Any]]:
        return [{"params": [*self.base.unet.parameters(), *self.prompts.values()]}]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/diffusion", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.log("val/diffusion", self._loss(batch), prog_bar=True, batch_size=len(batch["hr"]), sync_dist=True)

    def write(self) -> None:
        self.base.prompt_clean.copy_(self.prompts["clean"])
        self.base.prompt_degraded.copy_(self.prompts["degraded"])
        super().write()

    def _loss(self, batch: Mapping[str, Any]) -> Tensor:
        hr, lr = batch["hr"], batch["lr"]
        device, count = hr.device, len(hr)
        is_clean = torch.rand(count, device=device) < 0.5
        enlarged = F.interpolate(lr, size=hr.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
        images = torch.where(is_clean.view(-1, 1, 1, 1), hr, enlarged)
        with torch.no_grad():
            latents = self.base.encode(images * 2 - 1)
        steps = self.base.alphas_cumprod.numel()
        low = torch.rand(count, device=device) < 0.5
        timesteps = (torch.rand(count, device=device) * torch.where(low, steps // 2, steps)).long()
        noise = torch.randn_like(latents)
        noisy = add_noise(latents, noise, self.base.alphas_cumprod[timesteps])
        named_clean = is_clean & (torch.rand(count, device=device) >= UNCONDITIONAL)
        prompt = torch.where(named_clean.view(-1, 1, 1), self.prompts["clean"], self.prompts["degraded"])
        return F.mse_loss(self.base.predict(noisy, timesteps, Condition(prompt)), noise)
