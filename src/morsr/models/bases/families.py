"""Every family of bases that a folder may be of, and how a folder says which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from morsr.errors import ConfigError
from morsr.models.bases.architectures import Architecture
from morsr.models.bases.base import Base
from morsr.models.bases.flux1 import Flux1
from morsr.models.bases.flux2 import Flux2
from morsr.models.bases.reading import read_index, read_json
from morsr.models.bases.sana import Sana
from morsr.models.bases.sd3 import StableDiffusion3
from morsr.models.bases.sdxl import StableDiffusionXL
from morsr.models.bases.stable_diffusion import StableDiffusion
from morsr.models.bases.z_image import ZImage

FAMILIES: tuple[type[Base], ...] = (
    StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux1, Flux2, ZImage, Sana
)  # fmt: skip


ARCHITECTURES: Mapping[str, tuple[type[Base], Architecture]] = {
    shapes.name: (family, shapes) for family in FAMILIES for shapes in family.published
}
"""Family and shapes of every published model by name."""


def published_as(name: str) -> tuple[Any, Architecture]:
    """Family and shapes of a published model.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in ARCHITECTURES:
        raise ConfigError(f"random base: expected one of {', '.join(ARCHITECTURES)}, got {name!r}")
    return ARCHITECTURES[name]


def family_of(folder: Path) -> Any:
    """The class of a diffusers folder, by the pipeline that its model_index.json names; without one, by its networks.

    Raises:
        ConfigError: a family that is not known.
    """
    kind = read_index(folder).get("_class_name")
    if kind is None:
        path = folder / "transformer" / "config.json"
        network = read_json(path).get("_class_name") if path.is_file() else None
        return next((one for one in FAMILIES if network == one.network_class), StableDiffusion)
    found = next((one for one in FAMILIES if kind in one.pipelines), None)
    if found is None:
        known = ", ".join(name for one in FAMILIES for name in one.pipelines)
        raise ConfigError(f"{folder}: no base is known for {kind}; expected a folder of {known}")
    return found
