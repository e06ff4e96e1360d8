"""Mixture-of-ranks adapters for any torch model: read config, router, layer, inject, merge, files."""

from __future__ import annotations

from morsr.adapters.config import MoRConfig
from morsr.adapters.files import load_adapters, read_adapters_header, save_adapters
from morsr.adapters.inject import InjectionReport, active_adapters, adapter_parameters, inject
from morsr.adapters.merge import merged
from morsr.adapters.router import Router
from morsr.functional.routing import Routing

__all__ = [
    "InjectionReport",
    "MoRConfig",
    "Router",
    "Routing",
    "active_adapters",
    "adapter_parameters",
    "inject",
    "load_adapters",
    "merged",
    "read_adapters_header",
    "save_adapters",
]
