"""Exchange with peft and diffusers: one routing as a plain LoRA, and a LoRA as shared ranks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from morsr.adapters.config import MoRConfig
from morsr.adapters.inject import InjectionReport, inject, layers_of_set
from morsr.errors import ConfigError, InputError, WeightsError
from morsr.files import save_tensors, write_text

_PEFT_PREFIX = "base_model.model."
_PEFT_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings in the header of its files
_OTHER_KINDS = ("use_dora", "use_qalora", "kasa_config", "alora_invocation_tokens", "rank_pattern", "alpha_pattern")
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others take their part out of the base


def lora_state_dict(model: nn.Module, *, name: str = "generator", prefix: str = "") -> dict[str, Tensor]:
    """The present routing of one image as a plain LoRA, its gates and scale multiplied into B; alpha equals the rank.

    Every layer gets the same rank: chosen zero experts become rows of zeros.

    Args:
        model: an adapted model, or an adapted part of it (names are as seen from it).
        name: of the set.
        prefix: put before every key, as "base_model.model." (peft) or "unet." (diffusers).

    Returns:
        Keys ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` in float32.

    Raises:
        InputError: no routing is set, or it is for more than one image.
        ConfigError: a convolution with groups, dilation, or borders other than zeros, or a layer that the model
            registers twice: peft's ranks would not see these.
    """
    layers = layers_of_set(model, name)
    places = _places(model)
    state: dict[str, Tensor] = {}
    for layer_name, layer, ranks in layers:
        gates = layer.gates(name)
        if len(gates) != 1:
            raise InputError(f"a LoRA holds one routing, got one for {len(gates)} images; use routing.image(0)")
        if (lacking := _without_counterpart(layer, places)) is not None:
            raise ConfigError(f"{layer_name}: peft has no counterpart for {lacking}; leave it out of the targets")
        factors = gates[0].detach().float()
        lora_A, lora_B = ranks.lora_A.detach().float(), ranks.lora_B.detach().float()
        live = factors != 0
        lora_A = lora_A * live.view(-1, *[1] * (lora_A.ndim - 1))
        lora_B = (lora_B * factors).reshape(*lora_B.shape, *[1] * (lora_A.ndim - 2))
        state[f"{prefix}{layer_name}.lora_A.weight"] = lora_A.cpu().contiguous()
        state[f"{prefix}{layer_name}.lora_B.weight"] = lora_B.cpu().contiguous()
    return state


def export_lora(folder: str | os.PathLike[str], model: nn.Module, *, name: str = "generator") -> Path:
    """Write the present routing as a peft adapter folder (adapter_config.json and adapter_model.safetensors).

    ``peft.PeftModel.from_pretrained(bare_model, folder)`` then gives the same output as the adapted model.

    Raises:
        InputError, ConfigError: as ``lora_state_dict``.
    """
    state = lora_state_dict(model, name=name, prefix=_PEFT_PREFIX)
    folder = Path(folder)
    rank = next(iter(state.values())).shape[0]
    layers = [
        key.removeprefix(_PEFT_PREFIX).removesuffix(".lora_A.weight") for key in state if key.endswith("lora_A.weight")
    ]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        # A pattern, since peft takes a list of names for suffixes and "conv_in" would be found twice.
        "target_modules": "^(?:" + "|".join(re.escape(layer) for layer in layers) + ")$",
        "inference_mode": True,
    }
    save_tensors(folder / _PEFT_FILE, state, {"format": "pt"})
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    return folder


def import_lora(
    source: str | os.PathLike[str] | dict[str, Tensor],
    model: nn.Module,
    *,
    name: str = "generator",
    config: MoRConfig | None = None,
    condition_dim: int | None = None,
    scale: float | None = None,
) -> InjectionReport:
    """Inject a LoRA of peft or diffusers as shared ranks, which work for every image.

    Args:
        source: a peft folder, a safetensors file, or a state dict with keys ``…lora_A.weight`` and ``…lora_B.weight``.
        model: the model it was trained on.
        name: of the new set.
        config: to grow routed ranks beside the imported ones: its num_shared must equal the LoRA's rank, and its
            targets are replaced by the LoRA's layers. A plain LoRA by default.
        condition_dim: number of degradation scores, where the config routes.
        scale: alpha / r; by default what adapter_config.json beside the file, or the file's own header, says of it,
            else 1.

    Raises:
        WeightsError: an unreadable file, keys that are not those of one LoRA, ranks that differ between layers, layers
            or shapes that the model does not have, or what works otherwise in peft than here. ConfigError: a config
            that cannot hold the LoRA. Nothing has changed then.
    """
    state, read_scale, label = _read_lora(source)
    scale = read_scale if scale is None else scale
    pairs = _pairs(state, label)
    modules, places = dict(model.named_modules()), _places(model)
    for layer, parts in pairs.items():
        weight = getattr(modules.get(layer), "weight", None)
        if weight is None:
            raise WeightsError(f"{label}: the model has no layer {layer!r}")
        if parts["A"].shape[1:] != weight.shape[1:] or parts["B"].shape[0] != weight.shape[0]:
            got = f"A {tuple(parts['A'].shape)}, B {tuple(parts['B'].shape)}"
            raise WeightsError(f"{label}: {layer} has {got}, which do not fit a weight {tuple(weight.shape)}")
        if (lacking := _without_counterpart(modules[layer], places)) is not None:
            raise WeightsError(f"{label}: {layer} is {lacking}, where peft's ranks work otherwise than these would")
    ranks = {parts["A"].shape[0] for parts in pairs.values()}
    if len(ranks) != 1:
        raise WeightsError(f"{label}: layers have different ranks {sorted(ranks)}; one set has one number of ranks")
    rank = ranks.pop()
    targets = [f"(?:{re.escape(layer)})" for layer in pairs]  # a bare name would fit other layers that end in it too
    if config is None:
        config = MoRConfig.of_kind("lora", num_ranks=rank, targets=targets, scale=scale)
        scale = 1.0
    elif config.num_shared != rank:
        raise ConfigError(f"num_shared={config.num_shared}: expected {rank}, the rank of the imported LoRA")
    else:
        config = MoRConfig.from_dict({**config.to_dict(), "targets": targets})
        if config.scale == 0:
            raise ConfigError("scale: 0 cannot hold an imported LoRA")
        scale = scale / config.scale
    report = inject(model, config, condition_dim=condition_dim or 0, name=name)
    by_name = dict(zip(report.layer_names, layers_of_set(model, name), strict=True))
    with torch.no_grad():
        for layer, parts in pairs.items():
            ranks_of_layer = by_name[layer][2]
            ranks_of_layer.lora_A[:rank].copy_(parts["A"])
            ranks_of_layer.lora_B[:, :rank].copy_(parts["B"].flatten(1) * scale)
    return report


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Under which names each module is registered, by its id; one inside a part that is registered twice has one."""
    places: dict[int, list[str]] = {}
    for name, parent in model.named_modules():
        for key, child in parent._modules.items():  # named_children gives one of several names
            places.setdefault(id(child), []).append(f"{name}.{key}".removeprefix("."))
    return places


def _without_counterpart(layer: nn.Module, places: dict[int, list[str]]) -> str | None:
    """What peft does otherwise on a layer, or None. It adapts only the first of several names of one layer."""
    if len(names := places.get(id(layer), [])) > 1:
        return f"a layer that is registered as {' and '.join(names)}"
    base = getattr(layer, "base_layer", layer)
    if isinstance(base, nn.Conv2d):
        dilated = any(step > 1 and side > 1 for step, side in zip(base.dilation, base.kernel_size, strict=True))
        if base.groups > 1 or base.padding_mode != "zeros" or dilated:
            return "a convolution with groups, dilation or padded borders"
    return None


def _pairs(state: dict[str, Tensor], label: str) -> dict[str, dict[str, Tensor]]:
    """The two factors, "A" and "B", of every layer."""
    pairs: dict[str, dict[str, Tensor]] = {}
    adapters: dict[str, None] = {}
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise WeightsError(f"{label}: key {key!r} is not one of a LoRA on linear or convolutional layers")
        adapters[match["adapter"] or "(unnamed)"] = None
        parts = pairs.setdefault(match["layer"], {})
        if len(adapters) > 1:
            raise WeightsError(f"{label}: holds the adapters {' and '.join(adapters)}; give the keys of one of them")
        if match["part"] in parts:
            raise WeightsError(
                f"{label}: {match['layer']} has two tensors lora_{match['part']}; give those of one LoRA"
            )
        parts[match["part"]] = value
    incomplete = [layer for layer, parts in pairs.items() if set(parts) != {"A", "B"}]
    if incomplete or not pairs:
        raise WeightsError(f"{label}: lora_A and lora_B are not both there for {incomplete or 'any layer'}")
    return pairs


def _read_lora(source: str | os.PathLike[str] | dict[str, Tensor]) -> tuple[dict[str, Tensor], float, str]:
    """Tensors, scale and what to call them in messages."""
    if isinstance(source, dict):
        return source, 1.0, "state dict"
    path = Path(source)
    path = path / _PEFT_FILE if path.is_dir() else path
    beside = path.with_name("adapter_config.json") if path.name == _PEFT_FILE else None
    scale = 1.0
    if beside is not None and (beside.exists() or Path(source).is_dir()):
        try:
            scale = _scale(json.loads(beside.read_text(encoding="utf-8")), beside)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise WeightsError(f"{path.parent}: adapter_config.json cannot be read ({error})") from error
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; pickled adapters are not read, save them as safetensors")
    try:
        with safe_open(str(path), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            told = (file.metadata() or {}).get(_METADATA)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error})") from error
    if told:
        try:
            scale = _scale_of_header(json.loads(told), path)
        except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise WeightsError(f"{path}: {_METADATA} in its header cannot be read ({error})") from error
    return state, scale, str(path)


def _scale_of_header(settings: dict[str, Any], path: Path) -> float:
    """Scale by diffusers' metadata: of one network, or of several with the network's name before each setting."""
    networks = [key.removesuffix("r") for key in settings if key == "r" or key.endswith(".r")]
    scales = {
        _scale({key.removeprefix(network): value for key, value in settings.items() if key.startswith(network)}, path)
        for network in networks
    }
    if len(scales) != 1:
        raise WeightsError(
            f"{path}: expected one scale, its header has {sorted(scales) or 'none'}; import one network at a time"
        )
    return scales.pop()


def _scale(settings: dict[str, Any], path: Path) -> float:
    """Alpha over rank by peft's settings.

    Raises:
        WeightsError: a kind of LoRA that shared ranks cannot be.
    """
    for key in _OTHER_KINDS:
        if settings.get(key):
            raise WeightsError(f"{path}: {key}={settings[key]!r}: such a LoRA cannot be imported as shared ranks")
    if (init := settings.get("init_lora_weights", True)) not in _PLAIN_INITS:
        raise WeightsError(
            f"{path}: init_lora_weights={init!r} has changed the base's weights, which would be needed here; convert "
            "it to a plain LoRA by path_initial_model_for_weight_conversion of peft's save_pretrained"
        )
    rank = settings["r"]
    return float(settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank))
