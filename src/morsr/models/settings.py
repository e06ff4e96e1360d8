"""What a call of the restorer may ask for, checked before anything is done, and where and how exactly it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Literal

import torch

from morsr.errors import ConfigError
from morsr.functional.color import check_color

if TYPE_CHECKING:
    from morsr.adapters import RoutingContext
    from morsr.models.generator import OneStepGenerator
    from morsr.models.picture import Picture

RoutingMode = Literal["image", "tile", "sequence"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one call; `Restorer.__call__` says what they mean."""

    scale: float = 4.0
    budget: int | None = None
    generative: float = 1.0
    tile: int | Literal["auto"] | None = "auto"
    color: str = "wavelet"
    color_strength: float = 1.0
    routing: RoutingMode = "image"

    def __post_init__(self) -> None:
        budget, tile = self.budget, self.tile
        for name in ("scale", "generative", "color_strength"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ConfigError(f"{name}: expected a number, got {value!r}")
        if not 1.0 <= self.scale <= 8.0:
            raise ConfigError(f"scale: expected 1 to 8, got {self.scale}")
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
            raise ConfigError(f"budget: expected a number of ranks from 0, or None for all, got {budget!r}")
        if not 0.0 <= self.generative < float("inf"):
            raise ConfigError(f"generative: expected a factor from 0, got {self.generative}")
        if tile not in ("auto", None) and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
            raise ConfigError(f'tile: expected "auto", None or a size in output pixels, got {tile!r}')
        if self.routing not in ("image", "tile", "sequence"):
            raise ConfigError(f"routing: expected image, tile or sequence, got {self.routing!r}")
        check_color(self.color, self.color_strength)
        if self.color == "none" and self.color_strength != 1.0:
            raise ConfigError('color_strength has no effect with color="none"')

    def check_model(self, generator: OneStepGenerator) -> None:
        """Check that a model can do what is asked.

        Raises:
            ConfigError: settings of the routing without routed adapters.
        """
        routed = generator.context is not None and generator.context.config.is_routed
        if not routed and (self.budget is not None or self.generative != 1.0 or self.routing != "image"):
            raise ConfigError("budget, generative and routing need a model with routed adapters; this one has none")

    def size(self, picture: Picture) -> tuple[int, int]:
        """Exact height and width of the output."""
        height, width = picture.size
        return round(height * self.scale), round(width * self.scale)

    @contextlib.contextmanager
    def applied(self, context: RoutingContext | None) -> Iterator[None]:
        """Set the two knobs on a model's routing, and put back what was there."""
        if context is None:
            yield
            return
        before = context.budget, context.generative
        context.budget, context.generative = self.budget, self.generative
        try:
            yield
        finally:
            context.condition = None
            context.budget, context.generative = before


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by a name; "auto" is the machine's accelerator, or its processor.

    Raises:
        ConfigError: no such device on this machine.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # the device "meta" holds no values
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used on this machine: {reason}") from error
    return chosen


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The precision meant by a name; "auto" is half precision on an accelerator and float32 on a processor.

    Raises:
        ConfigError: not one of float32, bfloat16 and float16.
    """
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        backend = getattr(torch, device.type, None)
        supported = getattr(backend, "is_bf16_supported", None)
        return torch.bfloat16 if supported is not None and supported() else torch.float16
    chosen = allowed.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in allowed.values():
        raise ConfigError(f"dtype: expected auto, {', '.join(allowed)}, got {dtype!r}")
    return chosen
