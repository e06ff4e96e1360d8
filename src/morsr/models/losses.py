"""Losses on the decoded image as named terms, and the weights that every term of the training has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.adapters.inject import modules_of, original
from morsr.errors import ConfigError, WeightsError, check_fields
from morsr.functional.losses import feature_distances
from morsr.functional.quality import rgb_to_y
from morsr.functional.routing import Routing
from morsr.models.bases import Base
from morsr.models.discriminator import DiscriminatorConfig
from morsr.models.draws import Draws
from morsr.models.score_network import ScoreConfig

Features = Callable[[Tensor], Sequence[Tensor]]

PSNR_FLOOR = 1e-3
"""Added to the mean square error under the logarithm of the PSNR term, or flat crops would outweigh all others."""

VGG_FILE = "vgg16-397923af.pth"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """Weight of a loss term over the generator's steps.

    Args:
        weight: factor once the term is fully there.
        start: first step at which the term counts; before it, it is not even computed.
        ramp: steps over which it rises linearly from `start` on; 0 switches it on at once.

    Raises:
        ConfigError: a negative or infinite number.

    >>> [Weight(weight=2.0, start=10, ramp=4).at(step) for step in (9, 10, 12, 13, 99)]
    [0.0, 0.5, 1.5, 2.0, 2.0]
    """

    weight: float = 1.0
    start: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def at(self, step: int) -> float:
        """The factor at a generator step."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else self.weight

    def __bool__(self) -> bool:
        return self.weight > 0


@dataclass(frozen=True, kw_only=True)
class Distillation(ScoreConfig, Weight):
    """Weight and settings of a distillation by the frozen teacher; see `ScoreConfig`."""


@dataclass(frozen=True, kw_only=True)
class Gan(DiscriminatorConfig, Weight):
    """Weight of the adversarial loss and settings of its discriminator; see `DiscriminatorConfig`."""

    weight: float = 0.1


class TrainingStep(NamedTuple):
    """What a loss term sees of one generator step.

    lr: (B, 3, h, w), hr: (B, 3, H, W) in [0, 1]; sr: (B, 3, H, W), not clamped; z0: (B, C, H/f, W/f) clean latents.
    routing: None without routed adapters. draws: random numbers of these images. step: generator steps so far.
    severity: (B,) in [0, 1]; None without an estimator and in `network_loss`.
    """

    lr: Tensor
    hr: Tensor
    sr: Tensor
    z0: Tensor
    routing: Routing | None
    draws: Draws
    step: int
    severity: Tensor | None = None


class LossTerm(nn.Module):
    """A loss term of your own, added to a run as ``losses.extra.NAME``.

        class Edge(LossTerm):
            def forward(self, step):
                return (step.sr.diff(dim=-1) - step.hr.diff(dim=-1)).abs().mean()

    Args:
        weight, start, ramp: see `Weight`.
    """

    lr: float | None = None
    """Learning rate of the networks that the term owns; None: the generator's."""

    def __init__(self, weight: float = 1.0, start: int = 0, ramp: int = 0) -> None:
        super().__init__()
        self.schedule = Weight(weight=weight, start=start, ramp=ramp)

    def setup(self, base: nn.Module) -> None:
        """Called once with the base, adapters injected, before training."""

    def trained(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of networks that the term owns, by network; each gets an optimizer and `network_loss`."""
        return {}

    def network_loss(self, network: str, step: TrainingStep) -> Tensor:
        """What one of these networks minimises, after the generator's step; sr and z0 are detached."""
        raise NotImplementedError

    def forward(self, step: TrainingStep) -> Tensor:
        """The unweighted term, a scalar."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a run; None leaves a term out.

    Args:
        l1, l2, charbonnier, psnr, lpips, features: see `image_losses`.
        vsd: variational score distillation with a score network.
        csd: classifier score distillation, without one.
        gan: hinge loss of a discriminator.
        balance: of the router; without effect for a plain LoRA.
        extra: terms of your own by name.

    Raises:
        ConfigError: settings of the target score distillation where it does not work.
    """

    l1: Weight | None = None
    l2: Weight | None = field(default_factory=Weight)
    charbonnier: Weight | None = None
    psnr: Weight | None = None
    lpips: Weight | None = None
    features: Weight | None = None
    vsd: Distillation | None = None
    csd: Distillation | None = None
    gan: Gan | None = None
    balance: Weight | None = field(default_factory=Weight)
    extra: dict[str, LossTerm | None] | None = None

    def __post_init__(self) -> None:
        if self.csd and (self.csd.target or self.csd.samples > 1):
            raise ConfigError("losses.csd: expected no target and one sample; they are settings of losses.vsd")


def image_losses(
    lpips: nn.Module | None = None, features: Features | None = None
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Distances of SR images (B, 3, H, W), nominally in [0, 1] and not clamped, from HR images in [0, 1], by name.

        l1: mean absolute error on images in [0, 1].
        l2: mean square error on images in [−1, 1] (OSEDiff: 1).
        charbonnier: √(e² + 1e-6), a smooth L1, on images in [0, 1].
        psnr: mean over images of minus PSNR in dB on luma, so that every image counts alike however hard it is, as in
            the tables; an image above 30 dB counts less and less (`PSNR_FLOOR`).
        lpips: LPIPS with VGG features (OSEDiff: 2).
        features: distance in the features of a frozen network, the stand-in for LPIPS where its weights are missing.

    Args:
        lpips: the network of `build_lpips`, which "lpips" needs.
        features: gives the features (level → (B, C, h, w)) of images in [0, 1], which "features" needs.

    Source: OSEDiff (arXiv 2406.08177) eq. 7 (L2, LPIPS); for the PSNR term HINet (arXiv 2105.06086) section 3.2.
    """

    def minus_psnr(sr: Tensor, hr: Tensor) -> Tensor:
        error = (rgb_to_y(sr) - rgb_to_y(hr)).square().mean((1, 2, 3))
        return 10 * (error + PSNR_FLOOR).log10().mean()

    def distance(sr: Tensor, hr: Tensor) -> Tensor:
        assert features is not None
        with torch.no_grad():
            target = features(hr)
        return feature_distances(features(sr), target).mean()

    return {
        "l1": F.l1_loss,
        "l2": lambda sr, hr: 4 * F.mse_loss(sr, hr),
        "charbonnier": lambda sr, hr: ((sr - hr).square() + 1e-6).sqrt().mean(),
        "psnr": minus_psnr,
        "lpips": lambda sr, hr: lpips(sr.clamp(0, 1), hr, normalize=True).mean(),  # type: ignore[misc]
        "features": distance,
    }


def encoder_features(base: Base, images: Tensor) -> list[Tensor]:
    """What the autoencoder's encoder holds before each halving of the size and before its last convolution.

    Args:
        base: whose encoder runs, with whatever adapter set is active.
        images: (B, 3, H, W), nominally in [0, 1]; not clamped.

    Returns:
        One tensor (B, C, h, w) per level, the finest first.
    """
    encoder = base.vae.encoder
    layers = [original(module) for _, module in modules_of(encoder)]  # without copies of modules_to_save, which rest
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    watched = [layer for layer in convolutions if max(layer.stride) > 1]
    watched += [convolutions[-1]] if convolutions[-1] not in watched else []
    found: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0])) for layer in watched]
    try:
        encoder((images * 2 - 1).to(next(encoder.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def build_lpips() -> nn.Module:
    """LPIPS on VGG-16 as a frozen network: two image batches (and normalize=True for [0, 1]) to one distance each.

    Torchvision takes its weights from the cache of torch.hub (TORCH_HOME), to which it downloads them if it can.

    Raises:
        WeightsError: the weights cannot be had; the message says which file goes where.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        # The network inside: the metric around it would keep sums, and the graphs of all of them.
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.requires_grad_(False).eval()
    except Exception as error:  # torch.hub raises whatever the network library does
        raise WeightsError(
            f"LPIPS needs torchvision's VGG-16 weights, {VGG_FILE}, and they cannot be had ({error}). Put the file "
            f"into {Path(torch.hub.get_dir(), 'checkpoints')}, or go without: --model.losses.lpips=null "
            "--model.losses.features.weight=1"
        ) from error
