"""What every degradation estimator promises: images in, named scores in [0, 1] out, higher is worse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morsr.errors import ConfigError, InputError, check_images, class_at
from morsr.functional.precision import exact_products, keep_float32, without_autocast
from morsr.functional.severity import noisy_or, worst

# Imported on demand: CLIP needs transformers.
_KINDS = {
    "frequency": "morsr.estimators.frequency.FrequencyEstimator",
    "learned": "morsr.estimators.learned.LearnedEstimator",
    "clip": "morsr.estimators.clip.ClipEstimator",
}


class DegradationScores(NamedTuple):
    """Scores of B images in D named dimensions.

    Attributes:
        scores: (B, D) float32 in [0, 1], higher is worse.
        severity: (B,) float32 in [0, 1], one number per image.
        names: the D names.
    """

    scores: Tensor
    severity: Tensor
    names: tuple[str, ...]


class DegradationEstimator(nn.Module):
    """Base class of the estimators; a subclass sets `names` and writes `estimate`.

    A call runs without gradient and in float32, also under autocast. One image's scores must not depend on the other
    images of its batch.

    Args:
        names: of the scores that `estimate` returns; None takes the class's.
        worst: add a dimension `worst`, the largest of blur, noise and JPEG, so that the router sees one strong
            degradation that a mean would hide.
    """

    names: tuple[str, ...] = ()

    def __init__(self, names: Sequence[str] | None = None, *, worst: bool = False) -> None:
        super().__init__()
        own = tuple(type(self).names if names is None else names)
        self.names = (*own, "worst") if worst else own
        self.worst = worst

    def estimate(self, lr: Tensor) -> Tensor:
        """Scores (B, D), one per name, of float32 images (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError

    def severity(self, scores: Tensor) -> Tensor:
        """Severity (B,) of scores (B, D): the noisy-or of blur, noise and JPEG, or of all if no name is one of them."""
        return noisy_or(scores, self.names)

    @property
    def dim(self) -> int:
        """Number of scores per image."""
        return len(self.names)

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that differ from their defaults, as plain values: what a file stores."""
        return {"worst": True} if self.worst else {}

    def unsaved(self) -> list[str]:
        """Arguments of a constructor of the user's own that no file holds, since `settings` is not overridden."""
        if type(self).settings is not DegradationEstimator.settings:
            return []
        parameters = inspect.signature(type(self)).parameters.values()
        return [
            one.name for one in parameters if one.kind is not one.VAR_KEYWORD and one.name not in ("names", "worst")
        ]

    @property
    def spec(self) -> dict[str, Any]:
        """{"kind", "args"}: what an adapters file stores, and `build_estimator` takes."""
        path = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"kind": {value: key for key, value in _KINDS.items()}.get(path, path), "args": self.settings()}

    @torch.no_grad()
    def forward(self, lr: Tensor) -> DegradationScores:
        """Score a batch of low-resolution images.

        Args:
            lr: (B, 3, H, W) floating point in [0, 1], any size from 1 x 1.

        Raises:
            InputError: not a batch of RGB images in [0, 1], or NaN or infinity in it.
        """
        check_images(lr, name="lr")
        with without_autocast(lr.device), exact_products():
            scores = self.estimate(lr.float().clamp(0, 1))
            expected = (len(lr), len(self.names) - self.worst)
            if tuple(scores.shape) != expected:
                raise InputError(f"{type(self).__name__}: expected scores {expected}, got {tuple(scores.shape)}")
            scores = scores.clamp(0, 1)
            if self.worst:
                scores = torch.cat([scores, worst(scores, self.names[:-1])[:, None]], dim=1)
            return DegradationScores(scores, self.severity(scores), self.names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DegradationEstimator:
        # .half() of a model around the estimator moves its numbers, but keeps them in float32.
        return super()._apply(keep_float32(fn), recurse)

    def train(self, mode: bool = True) -> DegradationEstimator:
        """Estimators stay in evaluation mode: the router's input must not change with the mode of the model."""
        return super().train(False)


def build_estimator(spec: DegradationEstimator | Mapping[str, Any] | str, **settings: Any) -> DegradationEstimator:
    """Make an estimator.

    Args:
        spec: "frequency" (no weights), "learned" (small network, weights shipped), "clip" (CLIP image and text), or
            the import path of a subclass such as "mine.Mine"; an estimator, which is returned; or the "kind" and
            "args" that a file stores. A file names ours only: a class of the user's own is never imported because a
            file says so.
        settings: what the constructor takes; they replace those of a stored spec.

    Raises:
        ConfigError: an unknown name or setting, a path that cannot be imported, or a file that needs the user's class.
        WeightsError: weights that cannot be read.
    """
    if isinstance(spec, DegradationEstimator):
        return spec
    if isinstance(spec, Mapping):
        kind = spec.get("kind")
        if kind not in _KINDS:
            raise ConfigError(f"this model needs the estimator {kind!r}: give it, as in --estimator {kind}")
        stored = spec.get("args", {})  # files of 0.1 may say where CLIP's weights and texts were looked for
        settings = {key: stored[key] for key in stored if key not in ("text_cache", "local_files_only")} | settings
    else:
        kind = spec
    chosen = estimator_class(kind)
    try:
        inspect.signature(chosen).bind(**settings)
    except TypeError as error:
        raise ConfigError(f"estimator {kind!r}: {error}") from error
    return chosen(**settings)


def estimator_class(kind: str) -> type[DegradationEstimator]:
    """The class that a short name or an import path names.

    Raises:
        ConfigError: no such name, a path that cannot be imported, or another kind of class.
    """
    if "." not in (path := _KINDS.get(kind, kind)):
        raise ConfigError(f"estimator: expected {', '.join(_KINDS)} or a class path such as mine.Mine, got {kind!r}")
    return class_at(path, "estimator", DegradationEstimator)  # type: ignore[no-any-return]
