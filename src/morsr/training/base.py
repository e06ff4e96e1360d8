"""Training of a small base model from nothing: first its autoencoder, then its diffusion UNet.

The shipped `tiny` base is made by these two modules; a pretrained Stable Diffusion needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from morsr.errors import ConfigError
from morsr.functional.diffusion import add_noise
from morsr.models.backbone import Backbone, build_backbone, load_backbone
from morsr.training.schedules import ScheduleName, learning_rate_factor, total_steps


class BaseTraining(L.LightningModule):
    """Shared by the phases of a base: optimizer, schedule and the folder that the result is written to."""

    backbone: Backbone
    betas: tuple[float, float] = (0.9, 0.999)

    def __init__(self, *, out: str, lr: float, weight_decay: float, warmup: int, schedule: ScheduleName) -> None:
        super().__init__()
        self.out = Path(out)
        self.lr, self.weight_decay, self.warmup, self.schedule = lr, weight_decay, warmup, schedule

    def trained(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        """The parameters that this phase moves, or groups of them with settings of their own."""
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.trained(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        total = total_steps(self.trainer)
        factor = learning_rate_factor(self.schedule, warmup=self.warmup, total=total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            self.backbone.save(self.out)
            rank_zero_info(f"base model written to {self.out}")


def some_enlarged(images: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Shrink and enlarge some images four times, like those that a one-step generator encodes.

    Args:
        images: (B, 3, H, W) in [0, 1], sides of a multiple of 4.
        share: chance of each image.

    Returns:
        The images, and which of them were shrunk (B,).
    """
    small = F.interpolate(images, scale_factor=0.25, mode="area")
    enlarged = F.interpolate(small, size=images.shape[-2:], mode="bicubic").clamp(0, 1)
    chosen = torch.rand(len(images), device=images.device) < share
    return torch.where(chosen.view(-1, 1, 1, 1), enlarged, images), chosen


class AutoencodingPhase(BaseTraining):
    """Shared by the phases that reconstruct sharp images: the errors that they lower and the one that they report."""

    @staticmethod
    def errors(error: Tensor) -> tuple[Tensor, Tensor]:
        """Mean size of an error (B, 3, H, W), and that of its differences between neighbours along both axes."""
        return error.abs().mean(), error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = batch["hr"]
        decoded = self.backbone.decode(self.backbone.encode(images * 2 - 1)) / 2 + 0.5
        error = (decoded.clamp(0, 1) - images).square().mean((1, 2, 3))
        self.log("val/psnr", (-10 * error.log10()).mean(), prog_bar=True, batch_size=len(images))


class AutoencoderTraining(AutoencodingPhase):
    """Trains the autoencoder of a new backbone on sharp images.

    Half of the images are shrunk four times and enlarged again first, like those that the one-step generator encodes.
    The loss is the L1 between image and reconstruction and between their differences of neighbouring pixels, and a
    small penalty that keeps the latents within the range that the decoder of AutoencoderTiny accepts (it squashes at
    ±3). Noise on the latents keeps the small errors of a one-step UNet small in the picture. At the end the scaling
    factor is set to one over the latents' deviation.

    Args:
        unet: settings of the UNet2DConditionModel that will be trained next; only stored here.
        vae: settings of the autoencoder.
        out: folder for the finished backbone, in diffusers' layout.
        base_id: name that adapters record as their base.
        edge_weight: weight of the L1 on differences of neighbours; photographs have little energy in fine detail, and
            without it the detail comes late.
        enlarged_share: share of images that are shrunk and enlarged.
        latent_noise: deviation of the noise on the latents, relative to theirs.
        latent_penalty: weight of the mean square of the latents.
        lr: peak learning rate.
        weight_decay: of AdamW.
        warmup: steps of linear rise.
        schedule: "constant" or "cosine".
    """

    def __init__(
        self,
        *,
        unet: dict[str, Any],
        vae: dict[str, Any],
        out: str,
        base_id: str = "custom",
        edge_weight: float = 1.0,
        enlarged_share: float = 0.5,
        latent_noise: float = 0.05,
        latent_penalty: float = 1e-3,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup: int = 100,
        schedule: ScheduleName = "cosine",
    ) -> None:
        super().__init__(out=out, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule)
        self.save_hyperparameters()
        self.edge_weight, self.enlarged_share = edge_weight, enlarged_share
        self.latent_noise, self.latent_penalty = latent_noise, latent_penalty
        self.backbone = build_backbone(unet, vae, base_id=base_id)
        self.backbone.requires_grad_(False)
        self.backbone.vae.requires_grad_(True)
        self.backbone.to(memory_format=torch.channels_last)
        self.register_buffer("latent_square", torch.ones(()))

    def trained(self) -> nn.ParameterList:
        return nn.ParameterList(self.backbone.vae.parameters())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = some_enlarged(batch["hr"], self.enlarged_share)[0] * 2 - 1
        latents = self.backbone.encode(images)
        square = latents.square().mean()
        self.latent_square.lerp_(square.detach(), 0.01)
        noise = self.latent_noise * square.detach().sqrt() * torch.randn_like(latents)
        error = self.backbone.decode(latents + noise) - images
        reconstruction, edges = self.errors(error)
        self.log("train/reconstruction", reconstruction, prog_bar=True)
        self.log("train/latent_deviation", self.latent_square.sqrt())
        return reconstruction + self.edge_weight * edges + self.latent_penalty * square

    def on_fit_end(self) -> None:
        self.backbone.vae.register_to_config(scaling_factor=float(1 / self.latent_square.sqrt()))
        super().on_fit_end()


class DiffusionTraining(BaseTraining):
    """Trains the diffusion UNet and the two prompt embeddings of a backbone whose autoencoder is finished.

    Half of the latents are those of sharp images, half those of degraded images enlarged by bicubic interpolation,
    each with its own embedding; some sharp ones get the "degraded" embedding too, so that it serves as the
    unconditional side of classifier-free guidance.

    Args:
        base: folder written by `AutoencoderTraining`.
        out: folder for the finished backbone.
        dropout: share of sharp images that are given the "degraded" embedding.
        low_noise_share: share of timesteps drawn from the lower half of the schedule instead of from all of it; a
            one-step generator starts there.
        lr: peak learning rate.
        weight_decay: of AdamW.
        warmup: steps of linear rise.
        schedule: "constant" or "cosine".

    Raises:
        ConfigError: shares outside [0, 1].
    """

    def __init__(
        self,
        *,
        base: str,
        out: str,
        dropout: float = 0.1,
        low_noise_share: float = 0.5,
        lr: float = 5e-4,
        weight_decay: float = 1e-2,
        warmup: int = 200,
        schedule: ScheduleName = "cosine",
    ) -> None:
        super().__init__(out=out, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule)
        for name, share in (("dropout", dropout), ("low_noise_share", low_noise_share)):
            if not 0 <= share <= 1:
                raise ConfigError(f"{name}: expected a share in [0, 1], got {share}")
        self.save_hyperparameters()
        self.dropout, self.low_noise_share = dropout, low_noise_share
        self.backbone = load_backbone(base)
        self.backbone.requires_grad_(False)
        self.backbone.unet.requires_grad_(True)
        self.backbone.to(memory_format=torch.channels_last)
        self.prompts = nn.ParameterDict(
            {"clean": self.backbone.prompt_clean.clone(), "degraded": self.backbone.prompt_degraded.clone()}
        )

    def trained(self) -> nn.ParameterList:
        return nn.ParameterList([*self.backbone.unet.parameters(), *self.prompts.values()])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/diffusion", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/diffusion", self._loss(batch), prog_bar=True, batch_size=len(batch["hr"]))

    def on_fit_end(self) -> None:
        self.backbone.prompt_clean.copy_(self.prompts["clean"])
        self.backbone.prompt_degraded.copy_(self.prompts["degraded"])
        super().on_fit_end()

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        hr, lr = batch["hr"], batch["lr"]
        device, count = hr.device, len(hr)
        is_clean = torch.rand(count, device=device) < 0.5
        enlarged = F.interpolate(lr, size=hr.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
        images = torch.where(is_clean.view(-1, 1, 1, 1), hr, enlarged)
        with torch.no_grad():
            latents = self.backbone.encode(images * 2 - 1)
        steps = self.backbone.alphas_cumprod.numel()
        low = torch.rand(count, device=device) < self.low_noise_share
        timesteps = (torch.rand(count, device=device) * torch.where(low, steps // 2, steps)).long()
        noise = torch.randn_like(latents)
        noisy = add_noise(latents, noise, self.backbone.alphas_cumprod[timesteps])
        named_clean = is_clean & (torch.rand(count, device=device) >= self.dropout)
        prompt = torch.where(named_clean.view(-1, 1, 1), self.prompts["clean"], self.prompts["degraded"])
        return F.mse_loss(self.backbone.predict_noise(noisy, timesteps, prompt), noise)
