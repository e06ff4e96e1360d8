"""Which layers of a model an adapter set is put on: presets by role, and how targets match names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from morsr.errors import ConfigError

_ATTENTION = r"(?:to_q|to_k|to_v|to_out\.0)"
_ADDED = r"(?:add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FEED_FORWARD = r"ff\.net\.(?:0\.proj|2)"
_RESNET = r"(?:conv1|conv2|conv_shortcut)"
_SAMPLERS = r"(?:down|up)samplers\.\d+\.conv"
_MMDIT = rf"transformer_blocks\.\d+\.(?:attn2?\.(?:{_ATTENTION}|{_ADDED})|(?:ff|ff_context)\.net\.(?:0\.proj|2))"
_BLOCKS = rf"(?:{_ATTENTION}|{_FEED_FORWARD}|proj_in|proj_out|{_RESNET}|{_SAMPLERS})"

# Roles, not lists: the same preset fits the real networks and small ones of the same classes. Time embeddings, norms
# and the VAE decoder are left alone, as in OSEDiff, PiSA-SR and FreqOrtho-SR. SD 2.1's UNet has 258 such layers, its
# VAE encoder 31 with quant_conv; tiny_vae_encoder is that of AutoencoderTiny.
PRESETS: dict[str, tuple[str, ...]] = {
    "sd_unet": (rf"(?:down_blocks|mid_block|up_blocks)\..*\.{_BLOCKS}", r"conv_in", r"conv_out"),
    "sd_vae_encoder": (
        rf"encoder\.(?:down_blocks|mid_block)\..*\.{_BLOCKS}",
        r"encoder\.conv_in",
        r"encoder\.conv_out",
        r"quant_conv",
    ),
    "tiny_vae_encoder": (r"encoder\.layers\..*",),
    # Both streams of the MM-DiT, image and text, and the image's way in and out. Left alone in every transformer:
    # modulation, norms, and the embeddings of time, pooled text and text tokens.
    "sd3": (_MMDIT, r"pos_embed\.proj", r"proj_out"),
    "flux2": (
        rf"transformer_blocks\.\d+\.(?:attn\.(?:{_ATTENTION}|{_ADDED})|(?:ff|ff_context)\.linear_(?:in|out))",
        r"single_transformer_blocks\.\d+\.attn\.(?:to_qkv_mlp_proj|to_out)",
        r"x_embedder",
        r"proj_out",
    ),
    "flux1": (
        _MMDIT,
        r"single_transformer_blocks\.\d+\.(?:attn\.to_[qkv]|proj_mlp|proj_out)",
        r"x_embedder",
        r"proj_out",
    ),
    # One stream of image and text, and two blocks for each of them before it. The image's way in takes the tokens of
    # the whole batch in one row, which cannot be routed by image; the way out is left alone with it.
    "z_image": (rf"(?:layers|noise_refiner|context_refiner)\.\d+\.(?:attention\.{_ATTENTION}|feed_forward\.w[123])",),
    # The depthwise convolutions of both networks are left alone: a layer in groups takes no ranks.
    "sana": (
        rf"transformer_blocks\.\d+\.(?:attn[12]\.{_ATTENTION}|ff\.conv_(?:inverted|point))",
        r"patch_embed\.proj",
        r"proj_out",
    ),
    "dc_vae_encoder": (
        r"encoder\.down_blocks\..*\.(?:conv1|conv2|conv|attn\.to_(?:q|k|v|out)|conv_out\.conv_(?:inverted|point))",
        r"encoder\.conv_in",
        r"encoder\.conv_out",
    ),
    "all_unet_like": (rf"(?:.*\.)?(?:{_BLOCKS}|conv_in|conv_out)",),
}


def matching(target: str, names: Sequence[str]) -> list[str]:
    """The names that a target matches: a preset ("sd_unet", "sd_unet@unet"), a dotted suffix, or a regular expression.

    Raises:
        ConfigError: no regular expression, or an unknown preset before an ``@``.
    """
    preset, _, place = target.partition("@")
    if place and preset not in PRESETS:
        raise ConfigError(f"target {target!r}: no preset {preset!r}; there are {', '.join(PRESETS)}")
    pattern = "|".join(PRESETS.get(preset, (target,)))
    plain = target.replace(r"\.", ".")
    if place:
        pattern = rf"{re.escape(place)}\.(?:{pattern})"
    elif re.fullmatch(r"[\w.]+", plain) and preset not in PRESETS:
        pattern = rf"(?:.*\.)?{re.escape(plain)}"
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"target {target!r} is not a regular expression: {error}") from error
    return [name for name in names if compiled.fullmatch(name)]
