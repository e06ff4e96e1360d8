"""Mixture-of-ranks adapters for any torch model: read config, router, layer, inject, merge, checkpoint."""

from __future__ import annotations

from morsr.adapters.checkpoint import load_adapters, read_adapters_header, read_attached, save_adapters
from morsr.adapters.config import MoRConfig
from morsr.adapters.inject import (
    AdaptedEntry,
    InjectionReport,
    active_adapters,
    adapter_names,
    adapter_parameter_groups,
    adapter_parameters,
    checkpoint_function,
    inject,
    plain_state_dict,
    routing_context,
)
from morsr.adapters.layer import AdaptedLayer
from morsr.adapters.merge import auto_merged, merged
from morsr.adapters.peft_format import export_lora, import_lora, lora_state_dict
from morsr.adapters.router import RoutingContext
from morsr.adapters.targets import PRESETS, preset_targets
from morsr.adapters.transfer import start_from_adapters
from morsr.adapters.whole import train_whole
from morsr.functional.routing import Routing

__all__ = [
    "PRESETS",
    "AdaptedEntry",
    "AdaptedLayer",
    "InjectionReport",
    "MoRConfig",
    "Routing",
    "RoutingContext",
    "active_adapters",
    "adapter_names",
    "adapter_parameter_groups",
    "adapter_parameters",
    "auto_merged",
    "checkpoint_function",
    "export_lora",
    "import_lora",
    "inject",
    "load_adapters",
    "lora_state_dict",
    "merged",
    "plain_state_dict",
    "preset_targets",
    "read_adapters_header",
    "read_attached",
    "routing_context",
    "save_adapters",
    "start_from_adapters",
    "train_whole",
]
