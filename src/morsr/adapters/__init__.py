"""Mixture-of-ranks adapters for any torch model: read config, router, layer, inject, merge, files."""

from __future__ import annotations

from morsr.adapters.config import MoRConfig
from morsr.adapters.files import (
    load_adapters,
    read_adapters_header,
    read_attached,
    save_adapters,
    start_from_adapters,
)
from morsr.adapters.inject import (
    active_adapters,
    adapter_names,
    adapter_parameter_groups,
    adapter_parameters,
    inject,
    layers_of_set,
    plain_state_dict,
    switch_of,
)
from morsr.adapters.layer import AdaptedLayer
from morsr.adapters.merge import merged
from morsr.adapters.report import InjectionReport
from morsr.adapters.router import Router
from morsr.adapters.targets import PRESETS
from morsr.functional.routing import Routing

__all__ = [
    "PRESETS",
    "AdaptedLayer",
    "InjectionReport",
    "MoRConfig",
    "Router",
    "Routing",
    "active_adapters",
    "adapter_names",
    "adapter_parameter_groups",
    "adapter_parameters",
    "inject",
    "layers_of_set",
    "load_adapters",
    "merged",
    "plain_state_dict",
    "read_adapters_header",
    "read_attached",
    "save_adapters",
    "start_from_adapters",
    "switch_of",
]
