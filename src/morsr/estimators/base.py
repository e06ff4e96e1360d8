"""What every degradation estimator promises: images in, named scores in [0, 1] out, higher is worse."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morsr.errors import ConfigError, InputError, check_images
from morsr.functional.resample import unit_range

# imported when asked for: CLIP brings transformers
_KINDS = {
    "frequency": ("morsr.estimators.frequency", "FrequencyEstimator"),
    "learned": ("morsr.estimators.learned", "LearnedEstimator"),
    "clip": ("morsr.estimators.clip", "ClipEstimator"),
}


class DegradationScores(NamedTuple):
    """What an estimator says of a batch of B images in D named dimensions.

    Attributes:
        scores: (B, D) float32 in [0, 1], higher is worse.
        severity: (B,) float32 in [0, 1], all dimensions in one number.
        names: the D names.
    """

    scores: Tensor
    severity: Tensor
    names: tuple[str, ...]


class DegradationEstimator(nn.Module):
    """Base of the estimators; a subclass sets `names` and writes `estimate`.

    The call is made without gradient, in float32 even under autocast, and one image's scores do not depend on the
    other images of its batch.
    """

    names: tuple[str, ...] = ()
    takes_whole_numbers = False
    """Whether `estimate` also takes uint8 and uint16 images, of which it makes floats where it looks."""
    spec: dict[str, Any] | None = None
    """{"kind", "args"} from which `build_estimator` makes it again; None where it was made by hand."""

    @property
    def dim(self) -> int:
        """Number of scores per image."""
        return len(self.names)

    def estimate(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, D) and severity (B,) of checked float32 images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, lr: Tensor) -> DegradationScores:
        """Score a batch of low-resolution images.

        Args:
            lr: (B, 3, H, W) floating point in [0, 1], or uint8 or uint16 as fractions of their largest value; any size
                from 1 x 1.

        Raises:
            InputError: not a batch of RGB images in [0, 1], or NaN or infinity in it.
        """
        whole = lr.dtype in (torch.uint8, torch.uint16)
        check_images(unit_range(lr[..., :1, :1]) if whole else lr, name="lr")  # whole numbers are in range always
        with torch.autocast(device_type=lr.device.type, enabled=False):
            scores, severity = self.estimate(
                lr if whole and self.takes_whole_numbers else unit_range(lr).float().clamp(0, 1)
            )
        return DegradationScores(scores.clamp(0, 1), severity.clamp(0, 1), self.names)


@torch.no_grad()
def score_statistics(
    estimator: DegradationEstimator, batches: Iterable[Tensor], *, minimum: int = 1000
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scores over degraded images: the calibration pass of the router's input.

    Made once before training and then frozen: running statistics drift and differ between devices. The paper leaves
    the standardisation open. A dimension that never moves gets deviation 1, so that it is centred and not blown up.

    Args:
        estimator: any estimator.
        batches: batches of images (B, 3, H, W) in [0, 1]; sizes may differ between batches.
        minimum: how many images are needed.

    Returns:
        mean and deviation, both (D,) float32 on the CPU.

    Raises:
        InputError: fewer than `minimum` images came.
    """
    scores = [estimator(batch).scores.double().cpu() for batch in batches]
    count = sum(len(part) for part in scores)
    if count < max(minimum, 2):
        raise InputError(
            f"calibration needs at least {max(minimum, 2)} images, got {count}; give more, or lower minimum"
        )
    stacked = torch.cat(scores)
    deviation = stacked.std(dim=0)
    deviation = torch.where(deviation < 1e-4, torch.ones_like(deviation), deviation)
    return stacked.mean(dim=0).float(), deviation.float()


def build_estimator(kind: str, **settings: object) -> DegradationEstimator:
    """Make an estimator by name.

    Args:
        kind: "frequency" (no weights), "learned" (small network, weights shipped) or "clip" (CLIP image and text).
        settings: what the estimator's constructor takes.

    Raises:
        ConfigError: unknown kind or setting.
    """
    if kind not in _KINDS:
        raise ConfigError(f'estimator: expected "clip", "frequency" or "learned", got {kind!r}')
    module, name = _KINDS[kind]
    chosen = getattr(importlib.import_module(module), name)
    try:
        inspect.signature(chosen).bind(**settings)
    except TypeError as error:
        raise ConfigError(f"estimator {kind!r}: {error}") from error
    estimator = chosen(**settings)
    estimator.spec = {"kind": kind, "args": settings}
    return estimator
