"""Base models behind one protocol: `Base`, one subclass per family, and `load_base`."""

from __future__ import annotations

from morsr.models.bases.base import Base, Condition, save_network
from morsr.models.bases.loading import SHIPPED_BASES, build_base, load_base, package_weights, random_base
from morsr.models.bases.stable_diffusion import StableDiffusion

__all__ = [
    "SHIPPED_BASES",
    "Base",
    "Condition",
    "StableDiffusion",
    "build_base",
    "load_base",
    "package_weights",
    "random_base",
    "save_network",
]
