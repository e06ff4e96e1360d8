"""One order of the degradation chain as distributions: blur, resize, noise and JPEG, and how they are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from morsr.degradation.parameters import BlurParameters, StageParameters
from morsr.errors import ConfigError
from morsr.functional.kernels import KERNEL_KINDS, NONE, SINC


def check_range(name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    try:
        first, last = (float(bound) for bound in value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: expected two numbers [low, high], got {value!r}") from None
    if not (low <= first <= last <= high):  # written so that NaN fails too
        raise ConfigError(f"{name}: expected {low:g} <= low <= high <= {high:g}, got [{first:g}, {last:g}]")
    return first, last


def check_probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{name}: expected a probability from 0 to 1, got {value!r}")
    return float(value)


def _check_sum(name: str, values: tuple[float, ...]) -> None:
    if abs(sum(values) - 1) > 1e-6:
        raise ConfigError(f"{name}: expected probabilities that sum to 1, got {list(values)} (sum {sum(values):g})")


@dataclass(frozen=True, kw_only=True)
class BlurRecipe:
    """Distribution of one blur.

    Args:
        probability: of blurring at all.
        sinc_probability: of a sinc low-pass in place of the kinds.
        kinds: probabilities of the kinds iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso.
        sizes: smallest and largest kernel side, odd, in pixels; all odd sizes between are equally likely.
        sigma: range of both standard deviations, in pixels.
        beta_generalized, beta_plateau: ranges of the shape; half of the draws lie in [low, 1], half in [1, high].
    """

    probability: float = 1.0
    sinc_probability: float = 0.1
    kinds: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sizes: tuple[int, int] = (7, 21)
    sigma: tuple[float, float] = (0.2, 3.0)
    beta_generalized: tuple[float, float] = (0.5, 4.0)
    beta_plateau: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self) -> None:
        check_probability("blur.probability", self.probability)
        check_probability("blur.sinc_probability", self.sinc_probability)
        if not isinstance(self.kinds, (list, tuple)) or len(self.kinds) != 6:
            raise ConfigError(
                f"blur.kinds: expected 6 probabilities, of {', '.join(KERNEL_KINDS[:6])}; got {self.kinds!r}"
            )
        kinds = tuple(check_probability("blur.kinds", value) for value in self.kinds)
        _check_sum("blur.kinds", kinds)
        sizes = tuple(int(value) for value in check_range("blur.sizes", self.sizes, 3, 21))
        if sizes != tuple(self.sizes) or any(size % 2 == 0 for size in sizes):
            raise ConfigError(f"blur.sizes: expected two odd whole numbers from 3 to 21, got {list(self.sizes)}")
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "sigma", check_range("blur.sigma", self.sigma, 0.05, 50))
        for name in ("beta_generalized", "beta_plateau"):
            low, high = check_range(f"blur.{name}", getattr(self, name), 0.05, 50)
            if not low <= 1 <= high:
                raise ConfigError(f"blur.{name}: expected a range that holds 1, got [{low:g}, {high:g}]")
            object.__setattr__(self, name, (low, high))

    def draw(self, uniform: Tensor) -> BlurParameters:
        """Kernels from (B, 9) uniform draws."""
        low, high = self.sizes
        size = low + 2 * torch.floor(uniform[:, 2] * ((high - low) // 2 + 1)).to(torch.int64)
        kind = choose(uniform[:, 3], self.kinds)
        kind = torch.where(uniform[:, 1] < self.sinc_probability, torch.full_like(kind, SINC), kind)
        kind = torch.where(uniform[:, 0] < self.probability, kind, torch.full_like(kind, NONE))
        generalized, plateau = (
            _around_one(uniform[:, 7], bounds) for bounds in (self.beta_generalized, self.beta_plateau)
        )
        # A small sinc kernel cannot hold a low cut-off.
        lowest = torch.where(size < 13, math.pi / 3, math.pi / 5)
        return BlurParameters(
            kind=kind,
            size=size,
            sigma_x=between(uniform[:, 4], self.sigma),
            sigma_y=between(uniform[:, 5], self.sigma),
            rotation=between(uniform[:, 6], (-math.pi, math.pi)),
            beta=torch.where(kind >= 4, plateau, generalized),
            cutoff=(lowest + (math.pi - lowest) * uniform[:, 8]).to(torch.float32),
        )


@dataclass(frozen=True, kw_only=True)
class ResizeRecipe:
    """Distribution of one resize: probabilities of enlarging, shrinking and keeping, and the range of the factor."""

    up: float = 0.2
    down: float = 0.7
    keep: float = 0.1
    range: tuple[float, float] = (0.15, 1.5)

    def __post_init__(self) -> None:
        chances = tuple(check_probability(f"resize.{name}", getattr(self, name)) for name in ("up", "down", "keep"))
        _check_sum("resize up + down + keep", chances)
        low, high = check_range("resize.range", self.range, 0.05, 4)
        if not low <= 1 <= high:
            raise ConfigError(f"resize.range: expected a range that holds 1, got [{low:g}, {high:g}]")
        object.__setattr__(self, "range", (low, high))

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and modes from (B, 3) uniform draws."""
        choice = choose(uniform[:, 0], (self.up, self.down, self.keep))
        low, high = self.range
        factor = torch.where(choice == 0, between(uniform[:, 1], (1, high)), between(uniform[:, 1], (low, 1)))
        return torch.where(choice == 2, torch.ones_like(factor), factor), choose(uniform[:, 2], (1 / 3,) * 3)


@dataclass(frozen=True, kw_only=True)
class NoiseRecipe:
    """Distribution of one noise: Gaussian (sigma in levels of 255) or else Poisson (a factor on shot noise)."""

    gaussian_probability: float = 0.5
    sigma: tuple[float, float] = (1.0, 30.0)
    poisson_scale: tuple[float, float] = (0.05, 3.0)
    gray_probability: float = 0.4

    def __post_init__(self) -> None:
        check_probability("noise.gaussian_probability", self.gaussian_probability)
        check_probability("noise.gray_probability", self.gray_probability)
        object.__setattr__(self, "sigma", check_range("noise.sigma", self.sigma, 0, 255))
        object.__setattr__(self, "poisson_scale", check_range("noise.poisson_scale", self.poisson_scale, 0, 100))

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kinds, levels and gray flags from (B, 3) uniform draws."""
        kind = (uniform[:, 0] >= self.gaussian_probability).to(torch.int64)
        level = torch.where(kind == 0, between(uniform[:, 1], self.sigma), between(uniform[:, 1], self.poisson_scale))
        return kind, level, uniform[:, 2] < self.gray_probability


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One order of the chain: blur, resize, noise, JPEG (a range of qualities within [1, 100])."""

    blur: BlurRecipe = field(default_factory=BlurRecipe)
    resize: ResizeRecipe = field(default_factory=ResizeRecipe)
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    jpeg: tuple[float, float] = (30.0, 95.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "jpeg", check_range("jpeg", self.jpeg, 1, 100))

    def draw(self, uniform: Tensor) -> StageParameters:
        """Parameters from (B, 16) uniform draws."""
        scale, mode = self.resize.draw(uniform[:, 9:12])
        kind, level, gray = self.noise.draw(uniform[:, 12:15])
        return StageParameters(
            blur=self.blur.draw(uniform[:, :9]),
            resize_scale=scale,
            resize_mode=mode,
            noise_kind=kind,
            noise_level=level,
            noise_gray=gray,
            jpeg_quality=between(uniform[:, 15], self.jpeg),
        )


def second_order() -> StageRecipe:
    return StageRecipe(
        blur=BlurRecipe(probability=0.8, sigma=(0.2, 1.5)),
        resize=ResizeRecipe(up=0.3, down=0.4, keep=0.3, range=(0.3, 1.2)),
        noise=NoiseRecipe(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    )


def between(uniform: Tensor, bounds: tuple[float, float]) -> Tensor:
    return (bounds[0] + (bounds[1] - bounds[0]) * uniform).to(torch.float32)


def _around_one(uniform: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Half of the draws uniform in [low, 1], half in [1, high], from one uniform number."""
    low, high = bounds
    return torch.where(uniform < 0.5, low + (1 - low) * 2 * uniform, 1 + (high - 1) * (2 * uniform - 1)).to(
        torch.float32
    )


def choose(uniform: Tensor, probabilities: tuple[float, ...]) -> Tensor:
    """Places 0.. with the given probabilities."""
    edges = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)[:-1]
    return torch.searchsorted(edges, uniform.contiguous(), right=True)
