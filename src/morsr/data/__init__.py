"""Images, synthetic photographs and LightningDataModules; a name loads its module at first use."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Pair": "sources",
    "Photo": "sources",
    "RealESRGANDataModule": "datamodule",
    "find_photos": "sources",
    "paired_folder": "sources",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"morsr.data.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'morsr.data' has no attribute {name!r}")
