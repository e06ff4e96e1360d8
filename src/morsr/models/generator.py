"""The one-step generator: a low-resolution image in, one pass of the latent diffusion model, an image out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.adapters import InjectionReport, MoRConfig, Router, Routing, inject
from morsr.adapters.inject import RouterFactory
from morsr.errors import ConfigError, InputError, check_fields
from morsr.estimators import DegradationEstimator, DegradationScores
from morsr.functional.diffusion import Parametrization
from morsr.models.bases import Base


class GeneratorOutput(NamedTuple):
    """What one pass gives: the image, the clean latents, and what the router saw and decided.

    sr: (B, 3, H, W), nominally in [0, 1], not clamped. z0: (B, C, h, w), scaled latents.
    routing and scores: None where the generator has no adapters.
    """

    sr: Tensor
    z0: Tensor
    routing: Routing | None
    scores: DegradationScores | None


@dataclass(frozen=True, kw_only=True)
class OneStepConfig:
    """How one UNet call becomes a clean latent. A checkpoint records it, because the settings do not mix.

    Args:
        timestep: the fixed t of the network's call. OSEDiff: 999; PiSA-SR: 1. "auto": training finds the t at which
            noised HR latents have the signal-to-noise ratio of the encoded LR images, and records the number.
        parametrization: "epsilon", z0 = (z − √(1−ᾱ) ε)/√ᾱ (OSEDiff), for a flow z0 = z − σ v; or "residual",
            z0 = z − ε (PiSA-SR).
        scale_input: multiply the encoded image by √ᾱ first, so that it stands at the signal level that the UNet has
            seen at this timestep; then z0 = z − √((1−ᾱ)/ᾱ) ε. Meant for middle timesteps (`tiny`); at t = 999 almost
            nothing of the image would be left.
        scale: enlargement that the model is trained for; `fit` takes the data module's.

    Raises:
        ConfigError: a timestep outside the schedule, or scale_input with "residual", where it would do nothing good.
    """

    timestep: int | Literal["auto"] = 999
    parametrization: Parametrization = "epsilon"
    scale_input: bool = False
    scale: int = 4

    def __post_init__(self) -> None:
        check_fields(self)
        if self.timestep != "auto" and not (type(self.timestep) is int and 0 <= self.timestep <= 999):
            raise ConfigError(f'timestep: expected 0 to 999 or "auto", got {self.timestep!r}')
        if self.scale_input and self.parametrization == "residual":
            raise ConfigError("scale_input goes with parametrization 'epsilon' only")

    def shrink(self, scale: float) -> int:
        """How many of the networks' pixels make one of the output along each axis, at a scale below the trained one.

        >>> [OneStepConfig(scale=4).shrink(scale) for scale in (1, 1.5, 2, 2.5, 3, 4, 8)]
        [4, 2, 2, 2, 1, 1, 1]
        """
        factor = 1
        while 1.5 * factor * scale <= self.scale:
            factor *= 2
        return factor

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class OneStepGenerator(nn.Module):
    """LR → bicubic enlargement → VAE mean → one UNet call at a fixed timestep → z0 → VAE decoder → SR.

    Args:
        base: the pretrained model; frozen here.
        estimator: what turns the LR image into the scores that the router sees; needed with adapters only.
        adapters: the mixture of ranks to inject, or None for the base model as it is.
        router: class of the router, made from (config, layers, scores).
        one_step: timestep and parametrization.
        checkpointing: recompute activations in the backward pass instead of keeping them.

    Raises:
        ConfigError: adapters without an estimator.

    Source: OSEDiff (arXiv 2406.08177) section 3.2 for the path, MoR-DASR (arXiv 2511.16024) for the adapters.
    """

    def __init__(
        self,
        base: Base,
        estimator: DegradationEstimator | None = None,
        *,
        adapters: MoRConfig | None = None,
        router: RouterFactory = Router,
        one_step: OneStepConfig | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if adapters is not None and estimator is None:
            raise ConfigError("adapters need a degradation estimator: their router sees nothing else of the image")
        self.one_step = one_step or OneStepConfig()
        if self.one_step.parametrization not in base.parametrizations:
            raise ConfigError(
                f"one_step.parametrization: {type(base).__name__} knows {', '.join(base.parametrizations)}, "
                f"got {self.one_step.parametrization}"
            )
        self.base = base.requires_grad_(False).eval()
        self.base.to(memory_format=torch.channels_last)
        self.estimator = estimator.requires_grad_(False).eval() if estimator is not None else None
        self.adapters: InjectionReport | None = None
        if adapters is not None and estimator is not None:
            names = estimator.names if adapters.is_routed else ()
            self.adapters = inject(base, adapters, condition_dim=len(names), score_names=names, router=router)
        if checkpointing:
            base.set_checkpointing()

    def route(self, lr: Tensor, *, noise: Tensor | None = None, keep: Tensor | None = None) -> DegradationScores | None:
        """Score the LR images (B, 3, h, w) in [0, 1] and route every layer by the scores."""
        if self.adapters is None or self.estimator is None:
            return None
        scores = self.estimator(lr)
        if self.adapters.is_routed:
            self.adapters.route(scores.scores, noise=noise, keep=keep)
        return scores

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents; sides must be multiples of the latent factor."""
        return self.base.encode(images * 2 - 1)

    def denoise(self, latents: Tensor) -> Tensor:
        """The one call of the network: latents of the enlarged LR image to clean latents (B, C, h, w), float32."""
        t = self.one_step.timestep
        if t == "auto":
            raise ConfigError(
                "timestep: auto is found when training starts; expected a number, or adapters with theirs"
            )
        if self.one_step.scale_input:
            latents = latents * self.base.signal(t).to(latents.dtype)
        if self.one_step.parametrization == "epsilon":
            return self.base.clean(latents, t)
        # The network predicts what has to go (PiSA-SR, arXiv 2412.03017, eq. 4).
        return latents.float() - self.base.predict(latents, t).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents to images, nominally in [0, 1], not clamped."""
        return self.base.decode(latents).float() / 2 + 0.5

    def forward(
        self,
        lr: Tensor,
        *,
        scale: float = 4.0,
        size: tuple[int, int] | None = None,
        score_lr: Tensor | None = None,
        noise: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> GeneratorOutput:
        """Restore LR images.

        Args:
            lr: (B, 3, h, w) in [0, 1].
            scale: enlargement along each axis.
            size: exact output size (H, W) in pixels; overrides scale.
            score_lr: images (B, 3, h', w') in [0, 1] that the degradation scores are taken from, where `lr` are but
                parts of them: a patch of a few pixels says little about blur or noise.
            noise, keep: for the router in training, see `InjectionReport.route`.

        Raises:
            InputError: an output without pixels.
        """
        height, width = size or (round(lr.shape[-2] * scale), round(lr.shape[-1] * scale))
        if min(height, width) < 1:
            raise InputError(f"the output would be {height}x{width} pixels; give a larger scale or size")
        scores = self.route(lr if score_lr is None else score_lr, noise=noise, keep=keep)
        z0 = self.denoise(self.encode(pad_to_multiple(enlarge(lr, (height, width)), self.base.multiple)))
        sr = self.decode(z0)[..., :height, :width]
        return GeneratorOutput(sr, z0, self.adapters.routing if self.adapters is not None else None, scores)


def enlarge(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic interpolation (a = −0.75, half-pixel centres) to (H, W), clamped to [0, 1].

    The kernel is OpenCV's INTER_CUBIC, so the starting point of the generator is the bicubic row of the tables.
    """
    return F.interpolate(images, size=size, mode="bicubic", align_corners=False).clamp(0, 1)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples; returned as they are when they fit.

    The one padding rule of training, restorer and ONNX; the last 32 pixels of a photograph are 2 to 3.5 dB nearer to
    those of a larger one than when it is mirrored.
    """
    bottom, right = (-images.shape[-2] % multiple, -images.shape[-1] % multiple)
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images
