"""What one call of the restorer may ask for, checked before anything is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from morsr.adapters import Routing
from morsr.errors import ConfigError, check_fields

if TYPE_CHECKING:
    from morsr.models.generator import OneStepGenerator


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one call.

    Args:
        scale: enlargement, 1 to 8; the output has exactly round(scale · side) pixels a side. Well below the scale that
            the model is trained for, its output is made larger and shrunk.
        strength: factor on the routed gates: 0 keeps the shared ranks only, 1 is as trained.
        tile: side of the tiles in the networks' pixels, rounded up to what they take; "auto" goes by size and free
            memory; None for a single pass. Should memory run out, smaller tiles are used.
        color: "wavelet", "adain" or "none": how the input's colours are put back.
        color_strength: 0 to 1.
        routing: of one image, to use for every image, such as that of a film's first frame. Default: each image is
            scored as a whole, and all of its tiles share its routing.

    Raises:
        ConfigError: a setting of the wrong type, out of range, or without effect.
    """

    scale: float = 4.0
    strength: float = 1.0
    tile: int | Literal["auto"] | None = "auto"
    color: Literal["wavelet", "adain", "none"] = "wavelet"
    color_strength: float = 1.0
    routing: Routing | None = None

    def __post_init__(self) -> None:
        check_fields(self, least={"scale": 1})
        for name, most in (("scale", 8), ("color_strength", 1)):
            if getattr(self, name) > most:
                raise ConfigError(f"{name}: expected at most {most}, got {getattr(self, name):g}")
        whole = isinstance(self.tile, int) and not isinstance(self.tile, bool)
        if self.tile not in ("auto", None) and not (whole and self.tile > 0):
            raise ConfigError(f'tile: expected "auto", None or a number of pixels, got {self.tile!r}')
        if self.routing is not None and (not isinstance(self.routing, Routing) or self.routing.batch != 1):
            raise ConfigError(
                f"routing: expected one image's Routing, got {type(self.routing).__name__}; see .image(0)"
            )
        if self.color == "none" and self.color_strength != 1:
            raise ConfigError('color_strength has no effect with color="none"')

    def check_model(self, generator: OneStepGenerator) -> None:
        """Check that a model can do what is asked.

        Raises:
            ConfigError: settings of the routing without routed adapters.
        """
        routed = generator.adapters is not None and generator.adapters.is_routed
        if not routed and (self.strength != 1 or self.routing is not None):
            raise ConfigError("strength and routing need a model with routed adapters; this one has none")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Exact height and width of the output."""
        return round(height * self.scale), round(width * self.scale)
