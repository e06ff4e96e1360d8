"""Training of a decoder that draws detail: the adversarial phase of a small autoencoder, its latents left as they are.

The decoder of Stable Diffusion was trained with a discriminator; one that was trained on differences of pixels alone
leaves out the detail that its latents do not fix, and no adapter before it can bring that back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from morsr.errors import ConfigError
from morsr.functional.adversarial import hinge_discriminator, hinge_generator
from morsr.models.backbone import load_backbone, save_network
from morsr.models.discriminator import DiscriminatorConfig, ImageDiscriminator
from morsr.models.features import encoder_features
from morsr.models.losses import Weight
from morsr.training.base import AutoencodingPhase, some_enlarged
from morsr.training.schedules import ScheduleName


class DecoderTraining(AutoencodingPhase):
    """Trains the decoder of a finished base on, against a discriminator of the image; encoder and latents stay.

    The result is a folder in the layout of AutoencoderTiny, to be given as `decoder` of a generator on this base: the
    base itself and all adapters for it stay valid. Loss: L1 between image and reconstruction and between
    their differences of neighbouring pixels, differences of features of the frozen encoder, and the hinge loss of an
    `ImageDiscriminator` that compares reconstructions of sharp images with the images.

    Args:
        base: folder, hub id or shipped preset of a base whose autoencoder is an AutoencoderTiny.
        out: folder for the decoder.
        discriminator: settings of the discriminator; it has to see images.
        gan: weight of the adversarial term, a number or {weight, start, ramp}.
        features: weight of the L1 of features, relative to their deviation.
        edge_weight: weight of the L1 on differences of neighbours.
        enlarged_share: share of images that are shrunk and enlarged before they are encoded, as in
            `AutoencoderTraining`; the discriminator does not see them.
        latent_noise: deviation of the noise on the latents, relative to theirs.
        betas: of AdamW.
        lr: peak learning rate of the decoder; the discriminator's is in its settings and follows the same schedule.
        weight_decay: of AdamW.
        warmup: steps of linear rise.
        schedule: "constant" or "cosine".

    Raises:
        ConfigError: a base with another kind of autoencoder, or a discriminator of latents.

    Source: L1 with an adversarial loss for an autoencoder as in VQGAN (arXiv 2012.09841) and latent diffusion
    (arXiv 2112.10752, appendix G).
    """

    def __init__(
        self,
        *,
        base: str,
        out: str,
        discriminator: DiscriminatorConfig | None = None,
        gan: Any = 0.05,
        features: float = 0.1,
        edge_weight: float = 1.0,
        enlarged_share: float = 0.25,
        latent_noise: float = 0.05,
        betas: tuple[float, float] = (0.5, 0.99),
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        warmup: int = 50,
        schedule: ScheduleName = "cosine",
    ) -> None:
        super().__init__(out=out, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule)
        config = discriminator or DiscriminatorConfig(sees="image")
        if config.sees != "image":
            raise ConfigError(
                f'discriminator.sees: a decoder is judged by its images, expected "image", got {config.sees!r}'
            )
        self.save_hyperparameters(ignore="discriminator")
        self.backbone = load_backbone(base)
        kind = type(self.backbone.vae).__name__
        if kind != "AutoencoderTiny":
            raise ConfigError(f"base {base}: expected an AutoencoderTiny as its autoencoder, got {kind}")
        self.gan, self.betas = Weight.of(gan, name="gan"), betas
        self.features, self.edge_weight = features, edge_weight
        self.enlarged_share, self.latent_noise = enlarged_share, latent_noise
        self.backbone.requires_grad_(False)
        self.backbone.vae.decoder.requires_grad_(True)
        self.backbone.to(memory_format=torch.channels_last)
        self.discriminator = ImageDiscriminator(config)

    def trained(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.backbone.vae.decoder.parameters())},
            {"params": list(self.discriminator.parameters()), "lr": self.discriminator.config.lr},
        ]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images, is_enlarged = some_enlarged(batch["hr"], self.enlarged_share)
        latents = self._encode(images)
        noise = self.latent_noise * latents.square().mean().sqrt() * torch.randn_like(latents)
        decoded = self.backbone.decode(latents + noise) / 2 + 0.5
        reconstruction, edges = self.errors(2 * (decoded - images))
        terms = {"reconstruction": reconstruction, "edges": self.edge_weight * edges}
        if self.features > 0:
            terms["features"] = self.features * self._feature_distance(decoded, images)
        weight, sharp = self.gan.at(self.global_step), ~is_enlarged
        if weight > 0 and bool(sharp.any()):
            self.discriminator.requires_grad_(False)
            terms["gan"] = weight * hinge_generator(self.discriminator(decoded[sharp]))
            self.discriminator.requires_grad_(True)
            terms["discriminator"] = hinge_discriminator(
                self.discriminator(images[sharp]), self.discriminator(decoded[sharp].detach())
            )
        self.log_dict({f"train/{name}": value for name, value in terms.items() if name != "reconstruction"})
        self.log("train/reconstruction", terms["reconstruction"], prog_bar=True)
        return torch.stack(list(terms.values())).sum()

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        return self.backbone.encode(images * 2 - 1)

    def _feature_distance(self, decoded: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = encoder_features(self.backbone, images)
        found = encoder_features(self.backbone, decoded)
        return torch.stack(
            [(f - w).abs().mean() / w.std().clamp(min=1e-6) for f, w in zip(found, wanted, strict=True)]
        ).mean()

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            save_network(Path(self.out), self.backbone.vae)
            rank_zero_info(f"decoder written to {self.out}")
