"""Networks with peft's adapters as the peers put them on, and the files that the peers save of them."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import nn

UNET_PARTS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj")
VAE_PARTS = ("conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0")


def unet_lists(unet: nn.Module) -> dict[str, list[str]]:
    """The peers' three lists of UNet layers: weights whose name holds one of UNET_PARTS, by their place."""
    lists: dict[str, list[str]] = {"encoder": [], "decoder": [], "others": []}
    for name, _ in unet.named_parameters():
        if "bias" in name or "norm" in name or not any(part in name for part in UNET_PARTS):
            continue
        inside, outside = "down_blocks" in name or "conv_in" in name, "up_blocks" in name or "conv_out" in name
        lists["encoder" if inside else "decoder" if outside else "others"].append(name.removesuffix(".weight"))
    return lists


def vae_list(vae: nn.Module) -> list[str]:
    """OSEDiff's list of VAE layers, which names a layer once for each of VAE_PARTS that it matches."""
    found = []
    for name, _ in vae.named_parameters():
        if "bias" in name or "norm" in name:
            continue
        for part in VAE_PARTS:
            if (part in name and "encoder" in name) or ("quant_conv" in name and "post_quant_conv" not in name):
                found.append(name.removesuffix(".weight"))
    return found


def adapt(network: nn.Module, lists: dict[str, list[str]], rank: int, ending: str = "") -> None:
    for group, names in lists.items():
        config = LoraConfig(r=rank, init_lora_weights="gaussian", target_modules=names)
        network.add_adapter(config, adapter_name=f"default_{group}{ending}")


def randomize(network: nn.Module, *also: str) -> None:
    """Give LoRA weights, and parameters of these names, values that change the output."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora" in name or name in also:
                parameter.copy_(torch.randn_like(parameter) * 0.1)


def real(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(value.shape) if value.is_meta else value.detach().clone() for key, value in state.items()}


def osediff(unet: UNet2DConditionModel, vae: AutoencoderKL, *, rank: int = 4) -> dict[str, Any]:
    """What OSEDiff saves of networks, after its adapters have been put on them."""
    lists, encoder = unet_lists(unet), vae_list(vae)
    adapt(unet, lists, rank)
    adapt(vae, {"encoder": encoder}, rank)
    if not unet.conv_in.base_layer.weight.is_meta:
        randomize(unet, "conv_in.base_layer.weight", "conv_in.base_layer.bias")
        randomize(vae)
    return {
        "vae_lora_encoder_modules": encoder,
        **{f"unet_lora_{group}_modules": names for group, names in lists.items()},
        "rank_unet": rank,
        "rank_vae": rank,
        "state_dict_unet": real({k: v for k, v in unet.state_dict().items() if "lora" in k or "conv_in" in k}),
        "state_dict_vae": real({k: v for k, v in vae.state_dict().items() if "lora" in k}),
    }


def pisasr(unet: UNet2DConditionModel, *, ranks: tuple[int, int] = (4, 4)) -> dict[str, Any]:
    """What PiSA-SR saves of a UNet, after its two sets of adapters have been put on it."""
    lists = unet_lists(unet)
    for ending, rank in zip(("_pix", "_sem"), ranks, strict=True):
        adapt(unet, lists, rank, ending)
    if not unet.conv_in.base_layer.weight.is_meta:
        randomize(unet)
    return {
        **{f"unet_lora_{group}_modules{end}": names for end in ("_pix", "_sem") for group, names in lists.items()},
        "lora_rank_unet_pix": ranks[0],
        "lora_rank_unet_sem": ranks[1],
        "state_dict_unet": real({k: v for k, v in unet.state_dict().items() if "lora" in k}),
    }


def write(path: Path, content: dict[str, Any]) -> Path:
    torch.save(content, path)
    return path
