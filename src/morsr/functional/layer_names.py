"""Reading the dotted layer names of latent diffusion models: which block a layer is in, and the order data takes."""

from __future__ import annotations

from collections.abc import Sequence

_NETWORKS = ("vae", "unet")
_STAGES = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")


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

    diffusers registers a UNet's up blocks before its middle block, so that the order of registration is another one.
    Names within a block, and those of other networks behind these, keep their order.

    >>> flow_order(["unet.up_blocks.0.resnets.0.conv1", "unet.mid_block.resnets.0.conv1", "vae.encoder.conv_in"])
    [2, 1, 0]
    """
    return sorted(range(len(layers)), key=lambda index: (_place(layers[index]), index))


def _place(layer: str) -> tuple[int, int, int]:
    parts = layer.split(".")
    network = _NETWORKS.index(parts[0]) if parts[0] in _NETWORKS else len(_NETWORKS)
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if part in _STAGES:
            return network, _STAGES.index(part), int(following) if following.isdigit() else 0
    return network, 1, 0
