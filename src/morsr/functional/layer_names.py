"""Reading the dotted layer names of latent diffusion models: which block a layer is in, and the order data takes."""

from __future__ import annotations

from collections.abc import Sequence

_NETWORKS = ("vae", "unet")
_STAGES = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
_PARTS = ("resnets", "attentions", "downsamplers", "upsamplers")


def block_of(layer: str) -> str:
    """The network block of a layer, such as unet.down_blocks.0, unet.mid_block or vae.encoder.

    >>> block_of("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    'unet.down_blocks.1'
    """
    parts = layer.split(".")
    for index, part in enumerate(parts):
        if part == "mid_block":
            return ".".join(parts[: index + 1])
        if part.endswith("_blocks"):
            return ".".join(parts[: index + 2])
    return ".".join(parts[:2])


def flow_order(layers: Sequence[str]) -> list[int]:
    """Positions of the layers in the order in which an image passes them: VAE encoder, then the UNet from in to out.

    diffusers registers a UNet's up blocks before its middle block and a block's attentions before its ResNets, so the
    order of registration is not the order of the data. Names of other networks keep their order, behind these.

    >>> flow_order(["unet.up_blocks.0.resnets.0.conv1", "unet.mid_block.resnets.0.conv1", "vae.encoder.conv_in"])
    [2, 1, 0]
    """
    return sorted(range(len(layers)), key=lambda index: (_place(layers[index]), index))


def _place(layer: str) -> tuple[int, ...]:
    parts = layer.split(".")
    network = _NETWORKS.index(parts[0]) if parts[0] in _NETWORKS else len(_NETWORKS)
    found = next(((index, part) for index, part in enumerate(parts) if part in _STAGES), None)
    if found is None:
        return (network, 1)
    index, stage = found
    rest = parts[index + 1 :]
    block = int(rest.pop(0)) if stage in ("down_blocks", "up_blocks") and rest and rest[0].isdigit() else 0
    if len(rest) < 2 or rest[0] not in _PARTS or not rest[1].isdigit():
        return (network, _STAGES.index(stage), block)
    part = _PARTS.index(rest[0])
    sampler = part >= _PARTS.index("downsamplers")
    return (network, _STAGES.index(stage), block, int(sampler), int(rest[1]), part)
