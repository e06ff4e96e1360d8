"""True shapes of the published models on the meta device: no weights, no arithmetic."""

import re

import pytest
import torch

from morsr.adapters import MoRConfig, adapter_parameters, inject
from morsr.models.bases import Base, load_base

_UNET_LEFT = {"time_embedding.linear_*", "*.time_emb_proj"}
_MMDIT_LEFT = {"time_text_embed.*", "context_embedder", "*.norm1.linear", "*.norm1_context.linear", "norm_out.linear"}
# parameters of the network, layers of its preset, parameters per rank, what the preset leaves out
COUNTS = {
    "sd15": (859_520_964, 258, 1_005_736, _UNET_LEFT),
    "sd21": (865_910_724, 258, 1_013_928, _UNET_LEFT),
    "sd-turbo": (865_910_724, 258, 1_013_928, _UNET_LEFT),
    "sdxl": (2_567_463_684, 773, 3_041_960, {*_UNET_LEFT, "add_embedding.linear_*"}),
    "sd3": (2_028_328_000, 287, 1_311_872, _MMDIT_LEFT),
    "sd35-medium": (2_243_171_520, 339, 1_471_616, _MMDIT_LEFT),
    "flux1": (11_901_408_320, 420, 4_092_032, {*_MMDIT_LEFT, "single_transformer_blocks.*.norm.linear"}),
    "flux2-klein": (
        3_875_544_576, 102, 1_511_680,
        {"time_guidance_embed.*", "*_modulation*.linear", "context_embedder", "norm_out.linear"},
    ),
    "z-image": (
        6_154_908_736, 238, 2_480_640,
        {"*.adaLN_modulation.*", "t_embedder.*", "cap_embedder.*", "all_x_embedder.*", "all_final_layer.*.linear"},
    ),
    "sana": (1_604_462_752, 202, 1_146_944, {"time_embed.*", "caption_projection.*", "*.ff.conv_depth"}),
}  # fmt: skip
ENCODERS = {"flux2-klein": (32, 92_507), "sana": (73, 247_099)}  # Stable Diffusion's have 31 layers and the quant_conv


def build(name: str = "sd21") -> Base:
    with torch.device("meta"):
        return load_base(f"random:{name}").eval().requires_grad_(False)


def size_of(base: Base, name: str) -> int:
    """Parameters of an adapter set."""
    return sum(one.numel() for one in adapter_parameters(base, name))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("sd21", "sd3", "sana"))) for name in COUNTS]
)
def test_a_preset_reaches_its_layers_and_says_what_it_leaves(name):
    base = build(name)
    size, layers, per_rank, left = COUNTS[name]
    assert sum(one.numel() for one in base.denoiser.parameters()) == size
    report = inject(base, MoRConfig.lora(1, targets=base.targets))
    assert (len(report.layer_names), size_of(base, report.name)) == (layers, per_rank)
    patterns = [re.compile(re.escape(one).replace(r"\*", ".*")) for one in left]
    skipped = [one.partition(".")[2] for one in report.skipped if one.startswith(base.network_name)]
    assert [one for one in skipped if not any(p.fullmatch(one) for p in patterns)] == []
    assert all(any(p.fullmatch(one) for one in skipped) for p in patterns)
    encoder = "dc_vae_encoder" if name == "sana" else "sd_vae_encoder"
    report = inject(base, MoRConfig.lora(1, targets=(f"{encoder}@vae",)), name="encoder")
    usual = (32, 92_339) if base.latent_channels == 4 else (31, 92_347)
    assert (len(report.layer_names), size_of(base, report.name)) == ENCODERS.get(name, usual)


def test_stable_diffusion_has_the_published_sizes():
    base = build()
    assert sum(p.numel() for p in base.vae.parameters()) == 83_653_863
    assert (base.latent_factor, base.multiple, base.scaling_factor) == (8, 64, 0.18215)
    assert base.prompt_clean.shape == (1, 77, 1024)


def test_the_papers_adapters_have_44_million_parameters():
    base = build()
    inject(base, MoRConfig(targets=("sd_unet@unet", "sd_vae_encoder@vae")), condition_dim=7)
    # 1.0139 M + 0.0923 M per rank, 40 ranks, and a router of 290 layers x 36 slots x (7 + 1)
    assert sum(p.numel() for p in adapter_parameters(base)) == 44_334_200
