"""morsr: one-step real-world image super-resolution with a mixture of ranks.

Importing the package is cheap: a public name loads its module, and with it torch or diffusers, at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "DegradationRecipe": "morsr.degradation",
    "DegradationScores": "morsr.estimators",
    "InjectionReport": "morsr.adapters",
    "MoRConfig": "morsr.adapters",
    "Restorer": "morsr.restoring",
    "Routing": "morsr.adapters",
    "RoutingTable": "morsr.evaluation.routing",
    "active_adapters": "morsr.adapters",
    "adapter_parameters": "morsr.adapters",
    "build_estimator": "morsr.estimators",
    "degrade": "morsr.degradation",
    "inject": "morsr.adapters",
    "load_adapters": "morsr.adapters",
    "merged": "morsr.adapters",
    "save_adapters": "morsr.adapters",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'morsr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
