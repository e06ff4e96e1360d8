"""Benchmarks of models and of routing. Importing it is cheap: `morsr score` needs neither Lightning nor diffusers."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "BenchmarkReport": "tables",
    "BenchmarkTable": "callback",
    "RoutingTable": "routing",
    "ScoreDump": "callback",
    "evaluate": "score",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"morsr.evaluation.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'morsr.evaluation' has no attribute {name!r}")
