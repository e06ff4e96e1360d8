"""Stable Diffusion 1.5, 2.1 and Turbo, and the shipped bases: a UNet that predicts noise or velocity."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from morsr.errors import ConfigError
from morsr.functional.diffusion import add_noise, clean_latents, epsilon_from_velocity, scaled_linear_alphas_cumprod
from morsr.models.bases.base import STEPS, Architecture, Base, Condition, dtype_of, to_float32
from morsr.models.bases.reading import read_json

SD_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
"""Stable Diffusion's autoencoder."""
_SD15_UNET: dict[str, Any] = {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
_SD21_UNET: dict[str, Any] = {
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
_SMALL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "attention_head_dim": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "use_linear_projection": True,
}
_SMALL_VAE: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
_SCHEDULE: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("scaled_linear",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),  # no signal is left at t = 999; one step cannot start there
    "num_train_timesteps": (STEPS, None),
    "prediction_type": ("epsilon", "v_prediction", None),
}
"""What the settings of a schedule may be, the expected value first."""


class StableDiffusion(Base):
    """A UNet over the scaled-linear noise schedule, z_t = √ᾱ z0 + √(1 − ᾱ) n.

    The UNet's last norm and convolution stay in float32: at t = 999 an error of the predicted noise grows 14.6 times on
    its way into the clean latents.

    Args:
        unet: a diffusers UNet2DConditionModel predicting noise or velocity.
        vae: a diffusers AutoencoderKL or AutoencoderTiny.
        betas: first and last β of the schedule over 1000 steps, default Stable Diffusion's.
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction".
        common: as for `Base`.
    """

    network_name = "unet"
    network_class = "UNet2DConditionModel"
    autoencoders = ("AutoencoderKL", "AutoencoderTiny")
    pipeline = "StableDiffusionPipeline"
    text_width = "cross_attention_dim"
    targets = ("sd_unet@unet",)
    parametrizations: ClassVar[tuple[str, ...]] = ("epsilon", "residual")
    # SD-Turbo is SD 2.1 distilled: its networks have the same shapes. "small" is for tests.
    published: ClassVar[tuple[Architecture, ...]] = (
        Architecture("sd15", _SD15_UNET, SD_VAE, 77, 768),
        Architecture("sd21", _SD21_UNET, SD_VAE, 77, 1024),
        Architecture("sd-turbo", _SD21_UNET, SD_VAE, 77, 1024),
        Architecture("small", _SMALL_UNET, _SMALL_VAE, 7, 32),
    )

    unet: Any
    alphas_cumprod: Tensor

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        *,
        betas: tuple[float, float] = (0.00085, 0.012),
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        **common: Any,
    ) -> None:
        super().__init__(unet, vae, **common)
        for name in ("conv_norm_out", "conv_out"):
            to_float32(getattr(unet, name, None))
        self.prediction_type, self.betas = prediction_type, betas
        alphas = scaled_linear_alphas_cumprod(STEPS, beta_start=betas[0], beta_end=betas[1])
        self.register_buffer("alphas_cumprod", alphas, persistent=False)

    @classmethod
    def schedule(cls, path: Path) -> dict[str, Any]:
        """First and last β and the prediction type; the class does not matter, for only one step is made."""
        config = read_json(path)
        for name, allowed in _SCHEDULE.items():
            if (value := config.get(name)) not in allowed:
                said = " or ".join(map(repr, filter(None, allowed))) or "none"
                raise ConfigError(
                    f"{path}: the noise schedule of Stable Diffusion has {name} {said}; {config.get('_class_name')} "
                    f"has {value!r}"
                )
        betas = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        return {"betas": betas, "prediction_type": config.get("prediction_type") or "epsilon"}

    @property
    def multiple(self) -> int:
        """The autoencoder's factor times the UNet's."""
        return self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def feature_widths(self) -> list[int]:
        widths = list(self.unet.config.block_out_channels)
        return [*widths, widths[-1]]

    def signal(self, t: Tensor | int) -> Tensor:
        return self.alphas_cumprod[t].sqrt()

    def noised(self, z0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        return add_noise(z0, noise, self.alphas_cumprod[t])

    def extra(self, z_t: Tensor, condition: Condition) -> dict[str, Any]:
        """Further arguments of the UNet."""
        return {}

    def predict(self, z_t: Tensor, t: Tensor | int, condition: Condition | None = None) -> Tensor:
        """The noise, in float32 (float64 for a float64 UNet) from the last norm on; see `Base.predict`."""
        condition = condition or self.condition()
        steps = torch.as_tensor(t, device=z_t.device).expand(len(z_t))
        states = condition.tokens.to(dtype_of(self.unet)).expand(len(z_t), -1, -1)
        extra = self.extra(z_t, condition)
        output = self.unet(z_t.to(dtype_of(self.unet)), steps, encoder_hidden_states=states, **extra).sample
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.prediction_type == "v_prediction":
            return epsilon_from_velocity(z_t, output, self.alphas_cumprod[steps])
        return output

    def target(self, z0: Tensor, noise: Tensor) -> Tensor:
        return noise

    def clean_from(self, z_t: Tensor, prediction: Tensor, t: Tensor | int) -> Tensor:
        return clean_latents(z_t, prediction, self.alphas_cumprod[t])

    def features(self, z_t: Tensor, t: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """What the UNet holds after each of its down blocks and after its middle block; its up path does not run."""
        unet, condition = self.unet, condition or self.condition()
        dtype = dtype_of(unet)
        states = condition.tokens.to(dtype).expand(len(z_t), -1, -1)
        embedding = unet.time_embedding(unet.time_proj(t).to(dtype))
        if extra := self.extra(z_t, condition):
            embedding = embedding + unet.get_aug_embed(emb=embedding, encoder_hidden_states=states, **extra)
        hidden, found = unet.conv_in(z_t.to(dtype)), []
        for block in (*unet.down_blocks, unet.mid_block):
            text = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
            output = block(hidden, embedding, **text)
            hidden = output[0] if isinstance(output, tuple) else output
            found.append(hidden)
        return found

    def scheduler(self) -> Any:
        from diffusers import DDPMScheduler

        start, end = self.betas
        return DDPMScheduler(
            beta_start=start, beta_end=end, beta_schedule="scaled_linear", prediction_type=self.prediction_type
        )
