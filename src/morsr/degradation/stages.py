"""The parts of a recipe as distributions, and how parameters are drawn from them.

A `draw` takes uniform numbers (B, n) float64 in [0, 1), one column per drawn parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from morsr.degradation.parameters import (
    NO_JPEG,
    BlurParameters,
    DegradationParameters,
    FinalParameters,
    StageParameters,
)
from morsr.errors import ConfigError
from morsr.functional.kernels import KERNEL_KINDS, NONE, SINC

Range = tuple[float, float]


def check_numbers(part: object, **bounds: Range) -> None:
    """Refuse settings of a dataclass, numbers or ranges (low, high) by their defaults, that are out of bounds."""
    for name, (least, most) in bounds.items():
        value = getattr(part, name)
        is_range = isinstance(getattr(type(part), name), tuple)
        try:
            numbers = [float(number) for number in (value if is_range else (value,))]
        except (TypeError, ValueError):
            numbers = []
        # written so that NaN fails too
        if len(numbers) != 1 + is_range or not least <= numbers[0] <= numbers[-1] <= most:
            kind = "[low, high]" if is_range else "a number"
            raise ConfigError(f"{name}: expected {kind} from {least:g} to {most:g}, got {value!r}")
        object.__setattr__(part, name, tuple(numbers) if is_range else numbers[0])


def _check_sum(name: str, values: tuple[float, ...]) -> None:
    if min(values) < 0 or abs(sum(values) - 1) > 1e-6:
        raise ConfigError(f"{name}: expected probabilities that sum to 1, got {list(values)}")


@dataclass(frozen=True, kw_only=True)
class BlurRecipe:
    """Distribution of one blur.

    Args:
        probability: of blurring at all.
        sinc_probability: of a sinc low-pass instead of the kinds.
        kinds: probabilities of the kinds iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso.
        sizes: smallest and largest kernel side, odd, in pixels; all odd sizes between are equally likely.
        sigma: range of both standard deviations, in pixels.
        beta_generalized, beta_plateau: ranges of the shape; half of the draws lie in [low, 1], half in [1, high].
    """

    probability: float = 1.0
    sinc_probability: float = 0.1
    kinds: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sizes: tuple[int, int] = (7, 21)
    sigma: Range = (0.2, 3.0)
    beta_generalized: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)

    def __post_init__(self) -> None:
        check_numbers(self, probability=(0, 1), sinc_probability=(0, 1), sizes=(3, 21), sigma=(0.05, 50),
                      beta_generalized=(0.05, 50), beta_plateau=(0.05, 50))  # fmt: skip
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if len(self.kinds) != 6:
            raise ConfigError(f"kinds: expected 6 probabilities, of {', '.join(KERNEL_KINDS[:6])}; got {self.kinds!r}")
        _check_sum("kinds", self.kinds)
        if any(size % 2 != 1 for size in self.sizes):
            raise ConfigError(f"sizes: expected two odd whole numbers, got {list(self.sizes)}")
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        for name in ("beta_generalized", "beta_plateau"):
            _check_holds_one(name, getattr(self, name))

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
    range: Range = (0.15, 1.5)

    def __post_init__(self) -> None:
        check_numbers(self, up=(0, 1), down=(0, 1), keep=(0, 1), range=(0.05, 4))
        _check_sum("up + down + keep", (self.up, self.down, self.keep))
        _check_holds_one("range", self.range)

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
    sigma: Range = (1.0, 30.0)
    poisson_scale: Range = (0.05, 3.0)
    gray_probability: float = 0.4

    def __post_init__(self) -> None:
        check_numbers(
            self, gaussian_probability=(0, 1), sigma=(0, 255), poisson_scale=(0, 100), gray_probability=(0, 1)
        )

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
    jpeg: Range = (30.0, 95.0)

    def __post_init__(self) -> None:
        check_numbers(self, jpeg=(1, 100))

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
    """Real-ESRGAN's second order."""
    return StageRecipe(
        blur=BlurRecipe(probability=0.8, sigma=(0.2, 1.5)),
        resize=ResizeRecipe(up=0.3, down=0.4, keep=0.3, range=(0.3, 1.2)),
        noise=NoiseRecipe(sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5)),
    )


@dataclass(frozen=True, kw_only=True)
class SingleRecipe:
    """A share of images that are shrunk by area averages and degraded in one way only, at uniform strength.

    Args:
        share: of the images.
        blur: range of an isotropic Gaussian's standard deviation, in LR pixels.
        noise: range of the standard deviation of Gaussian noise at the LR size, in levels of 255.
        jpeg: range of the quality.
    """

    share: float = 0.0
    blur: Range = (0.2, 2.0)
    noise: Range = (0.0, 30.0)
    jpeg: Range = (15.0, 95.0)

    def __post_init__(self) -> None:
        check_numbers(self, share=(0, 1), blur=(0.05, 5), noise=(0, 255), jpeg=(1, 100))

    def draw(self, keys: Tensor, uniform: Tensor) -> DegradationParameters:
        """Parameters from (B, 3) uniform draws: which way, how strong, and whether noise is gray."""
        zeros, kind = torch.zeros(len(keys)), choose(uniform[:, 0], (1 / 3,) * 3)
        whole, ones, off = zeros.to(torch.int64), torch.ones_like(zeros), zeros > 0
        none = BlurParameters(kind=whole + NONE, size=whole + 21, sigma_x=ones, sigma_y=ones, rotation=zeros,
                              beta=ones, cutoff=ones)  # fmt: skip
        idle = StageParameters(blur=none, resize_scale=ones, resize_mode=whole, noise_kind=whole, noise_level=zeros,
                               noise_gray=off, jpeg_quality=ones * NO_JPEG)  # fmt: skip
        sigma, level, quality = (between(uniform[:, 1], bounds) for bounds in (self.blur, self.noise, self.jpeg))
        blur = replace(none, kind=torch.where(kind == 0, whole, none.kind), sigma_x=sigma, sigma_y=sigma)
        noisy = replace(idle, noise_level=torch.where(kind == 1, level, zeros),
                        noise_gray=(kind == 1) & (uniform[:, 2] < NoiseRecipe.gray_probability),
                        jpeg_quality=torch.where(kind == 2, quality, idle.jpeg_quality))  # fmt: skip
        final = FinalParameters(blur=blur, resize_mode=whole, jpeg_last=~off)
        return DegradationParameters(key=keys, sharpen=off, first=idle, second=noisy, final=final)


def between(uniform: Tensor, bounds: Range) -> Tensor:
    """Uniform draws in [low, high), float32."""
    return (bounds[0] + (bounds[1] - bounds[0]) * uniform).to(torch.float32)


def choose(uniform: Tensor, probabilities: tuple[float, ...]) -> Tensor:
    """Places 0.. with the given probabilities."""
    edges = torch.tensor(probabilities, dtype=torch.float64).cumsum(0)[:-1]
    return torch.searchsorted(edges, uniform.contiguous(), right=True)


def _around_one(uniform: Tensor, bounds: Range) -> Tensor:
    """Half of the draws uniform in [low, 1], half in [1, high], from one uniform number."""
    low, high = bounds
    below, above = low + (1 - low) * 2 * uniform, 1 + (high - 1) * (2 * uniform - 1)
    return torch.where(uniform < 0.5, below, above).to(torch.float32)


def _check_holds_one(name: str, bounds: Range) -> None:
    if not bounds[0] <= 1 <= bounds[1]:
        raise ConfigError(f"{name}: expected a range that holds 1, got {list(bounds)}")
