"""Restore images with a trained model: one image, one file, or a folder."""

from __future__ import annotations

from morsr.restoring.restorer import Restorer
from morsr.restoring.settings import Settings

__all__ = ["Restorer", "Settings"]
