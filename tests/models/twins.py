"""Small twins of every family: the real classes with random weights, saved as diffusers saves them."""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from morsr.adapters import MoRConfig, adapter_parameters, save_adapters
from morsr.estimators import build_estimator
from morsr.models.bases import load_base
from morsr.models.generator import OneStepConfig, OneStepGenerator

_VAE = {
    "latent_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
_SHIFTED_VAE = {
    **_VAE, "scaling_factor": 1.5, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
_DC_VAE = {
    "latent_channels": 4, "attention_head_dim": 4, "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "EfficientViTBlock"], "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8], "encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1],
    "encoder_qkv_multiscales": [[], [5]], "decoder_qkv_multiscales": [[], [5]], "scaling_factor": 0.4,
    "upsample_block_type": "interpolate", "downsample_block_type": "conv",
}  # fmt: skip
_UNET = {
    "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "cross_attention_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 4, "norm_num_groups": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
_ADDED = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 30,
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4,
    "out_channels": 4, "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 6,
    "pos_embed_max_size": 16, "dual_attention_layers": [0], "qk_norm": "rms_norm",
}  # fmt: skip
_FLUX1 = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 8, "pooled_projection_dim": 6, "axes_dims_rope": [2, 2, 4], "guidance_embeds": True,
}  # fmt: skip
_KLEIN = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 8, "timestep_guidance_channels": 8, "axes_dims_rope": [2, 2, 2, 2], "guidance_embeds": False,
}  # fmt: skip
_Z_IMAGE = {
    "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 8, "axes_dims": [2, 2, 4], "axes_lens": [64, 16, 16],
}  # fmt: skip
_SANA = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8,
    "sample_size": 8,
}  # fmt: skip
_DIFFUSION = ("DDPMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
_FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
_GROWING = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "max_shift": 1.15})
_SOLVER = ("DPMSolverMultistepScheduler", {
    "use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction",
})  # fmt: skip


class Family(NamedTuple):
    """Classes and settings of a twin; pooled: width of the pooled text vector."""

    pipeline: str
    network: str
    settings: dict[str, Any]
    vae: str
    vae_settings: dict[str, Any]
    scheduler: tuple[str, dict[str, Any]]
    target: str
    pooled: int = 0
    timestep: int = 250
    distilled: bool = False

    @property
    def targets(self) -> tuple[str, str]:
        """Layers of the denoiser and of the autoencoder's encoder."""
        return self.target, "dc_vae_encoder@vae" if self.vae == "AutoencoderDC" else "sd_vae_encoder@vae"

    @property
    def part(self) -> str:
        """Subfolder of the denoiser."""
        return self.target.partition("@")[2]


FAMILIES = {
    "sd15": Family(
        "StableDiffusionPipeline", "UNet2DConditionModel", _UNET, "AutoencoderKL", _VAE, _DIFFUSION, "sd_unet@unet",
        timestep=999,
    ),
    "sdxl": Family(
        "StableDiffusionXLPipeline", "UNet2DConditionModel", {**_UNET, **_ADDED}, "AutoencoderKL", _VAE, _DIFFUSION,
        "sd_unet@unet", pooled=6,
    ),
    "sd3": Family(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", _SD3, "AutoencoderKL", _SHIFTED_VAE, _FLOW,
        "sd3@transformer", pooled=6,
    ),
    "flux1": Family(
        "FluxPipeline", "FluxTransformer2DModel", _FLUX1, "AutoencoderKL", _SHIFTED_VAE, _GROWING,
        "flux1@transformer", pooled=6, distilled=True,
    ),
    "flux2-klein": Family(
        "Flux2KleinPipeline", "Flux2Transformer2DModel", _KLEIN, "AutoencoderKLFlux2", _VAE, _GROWING,
        "flux2@transformer", distilled=True,
    ),
    "z-image": Family(
        "ZImagePipeline", "ZImageTransformer2DModel", _Z_IMAGE, "AutoencoderKL", _SHIFTED_VAE, _FLOW,
        "z_image@transformer",
    ),
    "sana": Family(
        "SanaPipeline", "SanaTransformer2DModel", _SANA, "AutoencoderDC", _DC_VAE, _SOLVER, "sana@transformer",
    ),
}  # fmt: skip


def write_twin(folder: Path, name: str, **settings: Any) -> Path:
    """The small twin of a family as a diffusers folder, with its embeddings cached; settings: others of its network."""
    import diffusers

    family = FAMILIES[name]
    torch.manual_seed(0)
    getattr(diffusers, family.network)(**{**family.settings, **settings}).save_pretrained(folder / family.part)
    vae = getattr(diffusers, family.vae)(**family.vae_settings)
    if hasattr(vae, "bn"):
        vae.bn.running_mean.uniform_(-0.2, 0.2)
        vae.bn.running_var.uniform_(0.5, 2)
    vae.save_pretrained(folder / "vae")
    scheduler, settings = family.scheduler
    getattr(diffusers, scheduler)(**settings).save_pretrained(folder / "scheduler")
    index = {"_class_name": family.pipeline} | ({"is_distilled": True} if name == "flux2-klein" else {})
    (folder / "model_index.json").write_text(json.dumps(index))
    prompts = {side: torch.randn(1, 3, 8) for side in ("clean", "degraded")}
    if family.pooled:
        prompts |= {f"{side}_pooled": torch.randn(1, family.pooled) for side in ("clean", "degraded")}
    save_file(prompts, folder / "prompt_embeddings.safetensors")
    return folder


def adapters(name: str) -> MoRConfig:
    """A small mixture on the layers of a family's presets."""
    return MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=FAMILIES[name].targets)


def build(folder: Path, name: str, *, checkpointing: bool = False) -> OneStepGenerator:
    """A generator on a twin, with fresh adapters."""
    torch.manual_seed(1)
    return OneStepGenerator(
        load_base(folder), build_estimator("frequency"), adapters=adapters(name), checkpointing=checkpointing,
        one_step=OneStepConfig(timestep=FAMILIES[name].timestep),
    ).eval()  # fmt: skip


def on_base(base: Path, estimator: Any = "frequency", targets: tuple[str, ...] = ("sd_unet@unet",)) -> OneStepGenerator:
    """A generator on the base of a folder, with fresh adapters."""
    config = MoRConfig(num_ranks=8, num_shared=2, top_k=3, num_zero=2, targets=targets)
    return OneStepGenerator(
        load_base(base), build_estimator(estimator), adapters=config, one_step=OneStepConfig(timestep=150)
    ).eval()


def save(path: Path, generator: OneStepGenerator) -> Path:
    """Its adapters as training saves them."""
    base = generator.base
    extra = {"base": base.source, "estimator": generator.estimator.spec, "one_step": generator.one_step.to_dict()}
    return save_adapters(path, base, base_id=base.base_id, extra=extra)


def awaken(generator: OneStepGenerator) -> OneStepGenerator:
    """Give adapters and router the weights of a trained set."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(generator.base):
            parameter.add_(0.02 * torch.randn_like(parameter))
    return generator


def images(count: int = 3) -> torch.Tensor:
    """LR images (B, 3, 4, 4) of different contrast."""
    strength = torch.linspace(0.2, 1, count).view(-1, 1, 1, 1)
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * strength


def pipeline(base: Any) -> Any:
    """diffusers' pipeline of a base's family around its networks, without text encoders."""
    import diffusers

    kind = getattr(diffusers, base.pipeline)
    wanted = inspect.signature(kind).parameters
    parts: dict[str, Any] = {key: None for key, one in wanted.items() if one.default is one.empty}
    scheduler = base.scheduler()
    if hasattr(base, "betas"):  # one step of DDIM from the last timestep to none of the noise
        scheduler = diffusers.DDIMScheduler.from_config(
            scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
    parts |= {"scheduler": scheduler, "vae": base.vae, base.network_name: base.denoiser}
    made = kind(**parts, **({"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}))
    made.set_progress_bar_config(disable=True)
    return made
