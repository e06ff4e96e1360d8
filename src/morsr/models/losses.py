"""Losses on the decoded image as a dictionary of named terms, and the weights that every term of the training has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.errors import ConfigError, WeightsError
from morsr.functional.perceptual import feature_distance
from morsr.functional.quality import rgb_to_y

Features = Callable[[Tensor], Sequence[Tensor]]

PSNR_FLOOR = 1e-3
"""Added to the mean square error under the logarithm of the PSNR term, or flat crops would outweigh all others."""

_VGG_FILE = "vgg16-397923af.pth"


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
        for name in ("weight", "start", "ramp"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"loss weights: {name} may not be negative or infinite, got {value!r}")

    @classmethod
    def of(cls, value: float | Mapping[str, Any] | Weight, *, name: str) -> Weight:
        """A weight from what a config holds: a number, or a mapping with weight, start and ramp."""
        if isinstance(value, Weight):
            return value
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - {"weight", "start", "ramp"})
            if unknown or "weight" not in value:
                raise ConfigError(f"loss {name!r}: expected a number or {{weight, start, ramp}}, got {dict(value)}")
            return cls(**{key: _number(given) for key, given in value.items()})
        return cls(weight=_number(value))

    def at(self, step: int | None) -> float:
        """The factor at a generator step; None for long after the start."""
        if step is None:
            return self.weight
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / self.ramp) if self.ramp else self.weight

    def __str__(self) -> str:
        start = f" from step {self.start}" if self.start else ""
        return f"{self.weight:g}{start}{f' over {self.ramp} steps' if self.ramp else ''}"

    def __bool__(self) -> bool:
        return self.weight > 0


def _number(value: Any) -> Any:
    """A number that a command line gave as text: --model.loss.gan.weight=0.05 changes one value of a free mapping."""
    for kind in (int, float) if isinstance(value, str) else ():
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


class RestorationLoss(nn.Module):
    """Weighted sum of pixel and perceptual distances between SR and HR images.

    Each weight is a number, or a mapping with weight, start and ramp (see `Weight`).

    Args:
        l1: mean absolute error on images in [0, 1].
        l2: mean square error on images in [−1, 1] (OSEDiff: 1).
        charbonnier: √(e² + 1e-6), a smooth L1, on images in [0, 1].
        psnr: mean over images of minus PSNR in dB on luma, so that every image counts alike however hard it is, as in
            the tables; an image above 30 dB counts less and less (`PSNR_FLOOR`).
        lpips: LPIPS with VGG features (OSEDiff: 2).
        features: distance in the features of a frozen network, the stand-in for LPIPS where its weights are missing.
        lpips_folder: folder with torchvision's VGG-16 weights; by default the cache of torch.hub.
        feature_network: gives the features (level → (B, C, h, w)) of images in [0, 1]; needed with `features`.

    Raises:
        ConfigError: a negative weight, all of them zero, or `features` without a network.
        WeightsError: LPIPS is asked for and its weights cannot be had.

    Source: OSEDiff (arXiv 2406.08177) eq. 7 (L2, LPIPS); for the PSNR term HINet (arXiv 2105.06086) section 3.2.
    """

    def __init__(
        self,
        *,
        l1: float | Mapping[str, Any] = 0.0,
        l2: float | Mapping[str, Any] = 1.0,
        charbonnier: float | Mapping[str, Any] = 0.0,
        psnr: float | Mapping[str, Any] = 0.0,
        lpips: float | Mapping[str, Any] = 0.0,
        features: float | Mapping[str, Any] = 0.0,
        lpips_folder: str | os.PathLike[str] | None = None,
        feature_network: Features | None = None,
    ) -> None:
        super().__init__()
        given = {
            "l1": l1, "l2": l2, "charbonnier": charbonnier, "psnr": psnr, "lpips": lpips, "features": features,
        }  # fmt: skip
        self.weights: Mapping[str, Weight] = {name: Weight.of(value, name=name) for name, value in given.items()}
        if not any(self.weights.values()):
            raise ConfigError(f"loss weights: expected at least one positive, got {given}")
        if self.weights["features"] and feature_network is None:
            raise ConfigError("loss 'features': expected a feature_network to take them from")
        self.lpips = build_lpips(lpips_folder) if self.weights["lpips"] else None
        self._feature_network = feature_network

    def forward(self, sr: Tensor, hr: Tensor, *, step: int | None = None) -> dict[str, Tensor]:
        """Return the unweighted terms that count at this step, and "total", their weighted sum.

        Args:
            sr: (B, 3, H, W), nominally in [0, 1]; not clamped, so that pixels outside keep their gradient.
            hr: (B, 3, H, W) in [0, 1].
            step: generator step that the weights are taken at; None: all terms at full weight.
        """
        sr = sr.float()
        factors = {name: factor for name, weight in self.weights.items() if (factor := weight.at(step)) > 0}
        terms = {name: getattr(self, f"_{name}")(sr, hr) for name in factors}
        total = sum((factors[name] * term for name, term in terms.items()), start=sr.new_zeros(()))
        return {**terms, "total": total}

    def _l1(self, sr: Tensor, hr: Tensor) -> Tensor:
        return F.l1_loss(sr, hr)

    def _l2(self, sr: Tensor, hr: Tensor) -> Tensor:
        return 4 * F.mse_loss(sr, hr)

    def _charbonnier(self, sr: Tensor, hr: Tensor) -> Tensor:
        return ((sr - hr).square() + 1e-6).sqrt().mean()

    def _psnr(self, sr: Tensor, hr: Tensor) -> Tensor:
        error = (rgb_to_y(sr) - rgb_to_y(hr)).square().mean((1, 2, 3))
        return 10 * (error + PSNR_FLOOR).log10().mean()

    def _lpips(self, sr: Tensor, hr: Tensor) -> Tensor:
        assert self.lpips is not None
        return self.lpips(sr.clamp(0, 1), hr, normalize=True).mean()

    def _features(self, sr: Tensor, hr: Tensor) -> Tensor:
        assert self._feature_network is not None
        with torch.no_grad():
            target = self._feature_network(hr)
        return feature_distance(self._feature_network(sr), target)


def build_lpips(folder: str | os.PathLike[str] | None = None) -> nn.Module:
    """LPIPS on VGG-16 as a frozen network: two image batches (and normalize=True for [0, 1]) to one distance each.

    Args:
        folder: holds torchvision's VGG-16 weights, itself or in `checkpoints/`; None takes the cache of torch.hub, to
            which torchvision downloads them if it can.

    Raises:
        WeightsError: the weights cannot be had; the message says which file goes where.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    hub = Path(torch.hub.get_dir())
    if folder is not None:
        places = (Path(folder), Path(folder) / "checkpoints")
        found = next((place for place in places if (place / _VGG_FILE).is_file()), None)
        if found is None:
            raise WeightsError(f"{folder}: expected {_VGG_FILE} in it, torchvision's VGG-16 weights for LPIPS")
        if found.name != "checkpoints":
            raise WeightsError(f"{folder}: put {_VGG_FILE} into {folder}/checkpoints, where torchvision looks for it")
        torch.hub.set_dir(str(found.parent))
    try:
        # The network inside: the metric around it would keep sums, and the graphs of all of them.
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.requires_grad_(False).eval()
    except Exception as error:  # torch.hub raises whatever the network library does
        raise WeightsError(
            f"LPIPS needs torchvision's VGG-16 weights, {_VGG_FILE}, and they cannot be had ({error}). Put the file "
            f"into {hub / 'checkpoints'}, name a folder with it as loss.lpips_folder, or go without: loss.lpips: 0 "
            "(and loss.features: 1.0 for the features of the base model instead)"
        ) from error
    finally:
        if folder is not None:  # left alone otherwise: a set folder hides later changes of TORCH_HOME
            torch.hub.set_dir(str(hub))
