"""The routing of one image, fixed: as LoRA files, or folded into the weights of a plain diffusers folder.

Under a fixed routing a mixture of ranks is an ordinary LoRA, and folded into the weights it is no adapter at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from morsr.adapters import merged
from morsr.adapters.inject import layers_of_set
from morsr.errors import ConfigError, InputError
from morsr.files import expanded, save_tensors, write_text
from morsr.imaging.files import read_planes
from morsr.models.generator import OneStepGenerator
from morsr.models.saving import write_description

PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def fix_routing(generator: OneStepGenerator, *, image: Any = None, strength: float = 1.0) -> dict[str, float]:
    """Set the one routing that is to be exported, that of an image.

    Args:
        generator: its adapters keep the routing.
        image: what `read_planes` takes; scored by the model's own estimator.
        strength: factor on the gates of the routed ranks.

    Returns:
        The scores by name; empty where nothing is routed.

    Raises:
        ConfigError: a routed model without an image, or another with one.
    """
    adapters = generator.adapters
    if adapters is None or not adapters.is_routed:
        if image is not None or strength != 1.0:
            raise ConfigError("this model routes nothing: image and strength have no effect")
        return {}
    if image is None:
        raise ConfigError("image: expected the one whose routing is exported")
    adapters.strength = strength
    estimated = generator.route(read_planes(image)[:1].to(generator.base.device))
    assert estimated is not None
    return dict(zip(estimated.names, estimated.scores[0].tolist(), strict=True))


def export_diffusers(folder: str | os.PathLike[str], generator: OneStepGenerator) -> Path:
    """Write the present routing, folded into the weights, as a diffusers folder with `vae/`, `unet/`, `scheduler/`.

    Diffusers loads each part by itself; `Restorer.from_pretrained` loads the folder as a model without adapters.

    Raises:
        InputError: no routing is set.
    """
    folder, adapters = expanded(folder), generator.adapters
    name = adapters.name if adapters is not None else None
    with merged(generator.base, name) if adapters is not None else contextlib.nullcontext():
        generator.base.save(folder, name=name)
    description = {
        "base": ".",
        "estimator": None,
        "one_step": generator.one_step.to_dict(),
        "prompt": generator.base.prompt,
    }
    write_description(folder, description, adapted=False)
    return folder


def export_lora(folder: str | os.PathLike[str], generator: OneStepGenerator) -> dict[str, Path]:
    """Write the present routing as LoRA files.

    The denoiser's ranks go where `load_lora_weights(folder)` of its pipeline in diffusers finds them. Diffusers loads
    no LoRA into an autoencoder, so the VAE encoder's ranks become a peft folder `vae/`.

    Returns:
        What was written, by "unet" or "transformer" and "vae".

    Raises:
        InputError: no routing is set.
        ConfigError: no adapters, or modules trained whole, which a LoRA cannot hold.
    """
    adapters, base, folder = generator.adapters, generator.base, Path(folder)
    if adapters is None:
        raise ConfigError("this model has no adapters to export as a LoRA")
    if adapters.copies:
        raise ConfigError(f"{', '.join(adapters.copies)}: trained whole, no LoRA holds it; export as diffusers instead")
    parts = {name.partition(".")[0] for name in adapters.layer_names}
    written = {}
    if (network := base.network_name) in parts:
        written[network] = folder / DIFFUSERS_FILE
        state = lora_state_dict(base.denoiser, name=adapters.name, prefix=f"{network}.")
        save_tensors(written[network], state, {"format": "pt"})
    if "vae" in parts:
        written["vae"] = export_peft(folder / "vae", base.vae, name=adapters.name)
    return written


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
    """
    state: dict[str, Tensor] = {}
    for path, layer, ranks in layers_of_set(model, name):
        gates = layer.gates(name)
        if len(gates) != 1:
            raise InputError(f"a LoRA holds one routing, got one for {len(gates)} images; use routing.image(0)")
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
        InputError: as `lora_state_dict`.
    """
    folder, state = Path(folder), lora_state_dict(model, name=name, prefix="base_model.model.")
    layers = [re.escape(path) for path, _, _ in layers_of_set(model, name)]
    rank = len(next(iter(state.values())))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "inference_mode": True}
    settings["target_modules"] = f"^(?:{'|'.join(layers)})$"  # peft takes plain names for suffixes
    save_tensors(folder / PEFT_FILE, state, {"format": "pt"})
    write_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    return folder
