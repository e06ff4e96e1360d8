"""LoRA files of peft and diffusers: one image's routing as a plain LoRA, and a LoRA as shared ranks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from morsr.adapters import InjectionReport, MoRConfig, inject, layers_of_set
from morsr.errors import ConfigError, InputError, WeightsError
from morsr.files import save_tensors, write_text
from morsr.models.generator import OneStepGenerator
from morsr.models.saving import save_decoder

PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
_OTHER_KINDS = ("use_dora", "use_qalora", "kasa_config", "alora_invocation_tokens", "rank_pattern", "alpha_pattern")
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base's weights


def export_lora(folder: str | os.PathLike[str], generator: OneStepGenerator) -> dict[str, Path]:
    """Write the present routing as LoRA files.

    The denoiser's ranks go where `load_lora_weights(folder)` of its pipeline in diffusers finds them. Diffusers loads
    no LoRA into an autoencoder, so the VAE encoder's ranks become a peft folder `vae/`. A separate decoder is copied.

    Returns:
        What was written, by "unet" or "transformer", "vae" and "decoder".

    Raises:
        InputError: no routing is set.
        ConfigError: no adapters, or modules trained whole, which a LoRA cannot hold.
    """
    adapters, base, folder = generator.adapters, generator.base, Path(folder)
    if adapters is None:
        raise ConfigError("this model has no adapters to export as a LoRA")
    if adapters.saved:
        raise ConfigError(f"{', '.join(adapters.saved)}: trained whole, no LoRA holds it; export as diffusers instead")
    parts = {name.partition(".")[0] for name in adapters.layer_names}
    written = {}
    if (network := base.network_name) in parts:
        written[network] = folder / DIFFUSERS_FILE
        state = lora_state_dict(base.denoiser, name=adapters.name, prefix=f"{network}.")
        save_tensors(written[network], state, {"format": "pt"})
    if "vae" in parts:
        written["vae"] = export_peft(folder / "vae", base.vae, name=adapters.name)
    return written | {part: folder / place for part, place in save_decoder(folder, base).items()}


def lora_state_dict(model: nn.Module, *, name: str = "generator", prefix: str = "") -> dict[str, Tensor]:
    """The present routing of one image as a plain LoRA, its gates and scale multiplied into B; alpha equals the rank.

    Args:
        model: an adapted model or part of one; layers are named as seen from it.
        name: of the set.
        prefix: put before every key, "base_model.model." for peft and "unet." for diffusers.

    Returns:
        ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` in float32; ranks that are not active are zeros.

    Raises:
        InputError: no routing is set, or one of several images.
        ConfigError: a dilated convolution, which peft's ranks ignore.
    """
    state: dict[str, Tensor] = {}
    for path, layer, ranks in layers_of_set(model, name):
        gates = layer.gates(name)
        if len(gates) != 1:
            raise InputError(f"a LoRA holds one routing, got one for {len(gates)} images; use routing.image(0)")
        if _is_dilated(layer.torch_layer(name)):
            raise ConfigError(f"{path}: peft has no ranks for a dilated convolution; leave it out of the targets")
        factors, lora_A, lora_B = gates[0].detach().float(), ranks.lora_A.detach().float(), ranks.lora_B.detach()
        kernel = [1] * (lora_A.ndim - 2)
        lora_A = lora_A * (factors != 0).view(-1, 1, *kernel)
        lora_B = (lora_B.float() * factors).reshape(*lora_B.shape, *kernel)
        state[f"{prefix}{path}.lora_A.weight"] = lora_A.cpu().contiguous()
        state[f"{prefix}{path}.lora_B.weight"] = lora_B.cpu().contiguous()
    return state


def export_peft(folder: str | os.PathLike[str], model: nn.Module, *, name: str = "generator") -> Path:
    """Write the present routing as a folder for ``peft.PeftModel.from_pretrained(bare_model, folder)``.

    Raises:
        InputError, ConfigError: as `lora_state_dict`.
    """
    folder, state = Path(folder), lora_state_dict(model, name=name, prefix="base_model.model.")
    layers = [re.escape(match["layer"]) for match in map(_KEY.fullmatch, state) if match and match["part"] == "A"]
    rank = len(next(iter(state.values())))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "inference_mode": True}
    settings["target_modules"] = f"^(?:{'|'.join(layers)})$"  # peft takes plain names for suffixes
    save_tensors(folder / PEFT_FILE, state, {"format": "pt"})
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    return folder


def import_lora(
    source: str | os.PathLike[str], model: nn.Module, *, config: MoRConfig | None = None, condition_dim: int = 0
) -> InjectionReport:
    """Inject a LoRA of peft or diffusers as shared ranks, which are active for every image.

    Args:
        source: a peft folder or a safetensors file.
        model: the model it was trained on.
        config: to add routed ranks: num_shared must equal the LoRA's rank, targets become the LoRA's layers. A plain
            LoRA by default.
        condition_dim: number of degradation scores, where the config routes.

    Raises:
        WeightsError: not a plain LoRA of one rank, or layers that the model does not have. The model is unchanged.
        ConfigError: a config that cannot hold the LoRA.
    """
    pairs, scale = _read_lora(source)
    modules = dict(model.named_modules())
    for layer, (down, up) in pairs.items():
        shape = tuple(getattr(getattr(modules.get(layer), "weight", None), "shape", ()))
        if (len(up), *down.shape[1:]) != shape or _is_dilated(modules[layer]):
            raise WeightsError(f"{source}: {layer}: A {tuple(down.shape)} and B {tuple(up.shape)} do not fit")
    if len(ranks := {len(down) for down, _ in pairs.values()}) != 1:
        raise WeightsError(f"{source}: expected one rank on all layers, got {sorted(ranks)}")
    rank, targets = ranks.pop(), [f"(?:{re.escape(layer)})" for layer in pairs]
    config = config or MoRConfig.of_kind("lora", num_ranks=rank, targets=targets, scale=scale)
    if config.num_shared != rank or config.scale == 0:
        raise ConfigError(f"num_shared, scale: expected {rank}, not 0; got {config.num_shared}, {config.scale:g}")
    report = inject(model, MoRConfig.from_dict({**config.to_dict(), "targets": targets}), condition_dim=condition_dim)
    with torch.no_grad():
        for path, _, stored in layers_of_set(model, report.name):
            down, up = pairs[path]
            stored.lora_A[:rank].copy_(down)
            stored.lora_B[:, :rank].copy_(up.flatten(1) * (scale / config.scale))
    return report


def _is_dilated(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and any(
        step > 1 and side > 1 for step, side in zip(layer.dilation, layer.kernel_size, strict=True)
    )


def _read_lora(source: str | os.PathLike[str]) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """A and B of every layer, and alpha over rank (1 where no settings are found)."""
    path = Path(source) / PEFT_FILE if Path(source).is_dir() else Path(source)
    try:
        with safe_open(str(path), framework="pt") as file:
            found = [(_KEY.fullmatch(key), file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118
            text = (file.metadata() or {}).get("lora_adapter_metadata")  # where diffusers keeps peft's settings
        if path.name == PEFT_FILE:
            text = path.with_name("adapter_config.json").read_text(encoding="utf-8")
        scale = _scale(json.loads(text), path) if text else 1.0
        tensors = {(match["layer"], match["part"]): value for match, value in found}  # type: ignore[index]
        pairs = {layer: (tensors[layer, "A"], tensors[layer, "B"]) for layer, _ in tensors}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise WeightsError(f"{path}: not one plain LoRA of peft or diffusers ({error!r})") from error
    if len(tensors) != len(found) or not pairs:
        raise WeightsError(f"{path}: expected one LoRA, got {len(found)} tensors of {len(pairs)} layers")
    return pairs, scale


def _scale(settings: dict[str, Any], path: Path) -> float:
    network = next((key for key in settings if key == "r" or key.endswith(".r")), "r").removesuffix("r")
    own = {key.removeprefix(network): value for key, value in settings.items() if key.startswith(network)}
    odd = [key for key in _OTHER_KINDS if own.get(key)]
    if odd or own.get("init_lora_weights", True) not in _PLAIN_INITS or len(own) != len(settings):
        raise WeightsError(f"{path}: expected the settings of one plain LoRA, got {odd or 'another initialisation'}")
    return float(own["lora_alpha"] / (own["r"] ** 0.5 if own.get("use_rslora") else own["r"]))
