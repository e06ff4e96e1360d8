"""Every family of bases that a folder may be of, and how a folder says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from morsr.errors import ConfigError
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


def family_called(name: str) -> Any:
    """The family of a class's name."""
    return next(one for one in FAMILIES if one.__name__ == name)


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
