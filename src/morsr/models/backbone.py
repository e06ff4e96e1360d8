"""The pretrained latent diffusion model under the adapters: autoencoder, UNet, noise schedule, prompt embeddings.

A backbone is a diffusers folder (`vae/`, `unet/`, `scheduler/`), local or on the hub, or the one shipped in the
package. Two prompt embeddings go with it: "clean" steers towards good photographs and "degraded" away from bad ones.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from morsr.adapters import plain_state_dict, switch_of
from morsr.errors import ConfigError
from morsr.files import save_tensors, write_text
from morsr.functional.diffusion import epsilon_from_velocity, scaled_linear_alphas_cumprod
from morsr.functional.precision import keep_float32
from morsr.models.architectures import TAESD, architecture
from morsr.models.precision import to_float32
from morsr.models.pretrained import (
    PROMPTS_FILE,
    cached_prompt,
    first_readable,
    read_base,
    read_base_id,
    read_decoder,
    read_prompts,
)

SHIPPED_BASES = ("tiny", "tiny-fidelity")
"""Bases that the package brings along; "tiny-fidelity" has fewer operations per pixel and more weights."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    Under autocast, or stored in half precision, the UNet's last norm and convolution, ᾱ and the prompt embeddings stay
    in float32: at t = 999 an error of the predicted noise grows 14.6 times on its way into the clean latents.

    Args:
        unet: a diffusers UNet2DConditionModel predicting noise or velocity.
        vae: a diffusers AutoencoderKL or AutoencoderTiny.
        prompts: embeddings "clean" and "degraded", each (1, T, cross_attention_dim).
        decoder: an AutoencoderTiny for the same latents, which decodes in place of `vae` at a fraction of its work.
        betas: first and last β of the scaled-linear schedule over 1000 steps, default Stable Diffusion's.
        prediction_type: what the UNet predicts, "epsilon" or "v_prediction".
        base_id: what adapters record as their base.
        source: from where `load_backbone` gets the same base again; None for one that was made by hand.
        prompt: text behind the "clean" embedding, where it is known.

    Raises:
        ConfigError: embeddings of the wrong width, a decoder for other latents, latent channels that differ, an unknown
            prediction type.
    """

    unet: Any  # diffusers sets most of their attributes at run time
    vae: Any
    decoder: Any
    alphas_cumprod: Tensor
    prompt_clean: Tensor
    prompt_degraded: Tensor

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        *,
        prompts: Mapping[str, Tensor],
        decoder: nn.Module | None = None,
        betas: tuple[float, float] = (0.00085, 0.012),
        prediction_type: str = "epsilon",
        base_id: str = "custom",
        source: str | None = None,
        prompt: str | None = None,
    ) -> None:
        super().__init__()
        width = unet.config.cross_attention_dim
        for name in ("clean", "degraded"):
            if name not in prompts:
                raise ConfigError(f"prompt embeddings: expected 'clean' and 'degraded', got {sorted(prompts)}")
            if prompts[name].ndim != 3 or prompts[name].shape[-1] != width:
                raise ConfigError(
                    f"prompt embedding {name!r}: expected (1, tokens, {width}) for the UNet of {base_id}, got "
                    f"{tuple(prompts[name].shape)}; its text encoder is another model's"
                )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ConfigError(
                f"the UNet takes {unet.config.in_channels} latent channels, "
                f"the autoencoder gives {vae.config.latent_channels}"
            )
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(f"prediction type: expected 'epsilon' or 'v_prediction', got {prediction_type!r}")
        self.unet, self.vae = unet, vae
        for name in ("conv_norm_out", "conv_out"):
            if getattr(unet, name, None) is not None:
                setattr(unet, name, to_float32(getattr(unet, name)))
        self.prediction_type, self.base_id = prediction_type, base_id
        self.source, self.prompt = source, prompt
        self.register_buffer("prompt_clean", prompts["clean"].float())
        self.register_buffer("prompt_degraded", prompts["degraded"].float())
        self.betas = betas
        alphas = scaled_linear_alphas_cumprod(beta_start=betas[0], beta_end=betas[1])
        self.register_buffer("alphas_cumprod", alphas, persistent=False)
        self.use_decoder(decoder)

    def use_decoder(self, decoder: nn.Module | None) -> None:
        """Let another AutoencoderTiny decode in place of `vae`, frozen; None for `vae` itself.

        Raises:
            ConfigError: a decoder for other latents.
        """
        if decoder is not None and (_factor(decoder), decoder.config.latent_channels) != (
            self.latent_factor, self.vae.config.latent_channels
        ):  # fmt: skip
            raise ConfigError(
                f"decoder: expected one for {self.vae.config.latent_channels} latent channels of {self.latent_factor} "
                f"pixels, got {decoder.config.latent_channels} channels of {_factor(decoder)}"
            )
        self.decoder = None if decoder is None else decoder.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_float32(fn), recurse=False)

    @property
    def prompts(self) -> dict[str, Tensor]:
        """The embeddings "clean" and "degraded", (1, T, width) each, on the CPU: what a checkpoint caches."""
        return {"clean": self.prompt_clean.cpu(), "degraded": self.prompt_degraded.cpu()}

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along each axis: 8 for Stable Diffusion, 4 for `tiny`."""
        return _factor(self.vae)

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
        encoded = self.vae.encode(images.to(_dtype(self.vae)))
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        return raw * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), nominally in [−1, 1], not clamped."""
        decoder = self.vae if self.decoder is None else self.decoder
        # An AutoencoderTiny for Stable Diffusion takes scaled latents, and its factor says so: it is 1.
        return decoder.decode((latents / float(decoder.config.scaling_factor)).to(_dtype(decoder))).sample

    def predict_noise(self, latents: Tensor, timesteps: Tensor | int, prompt: Tensor | None = None) -> Tensor:
        """Predict the noise ε in latents at the given timesteps, steered by a prompt embedding (default: "clean").

        Args:
            latents: z_t (B, C, h, w), any precision.
            timesteps: one integer, or one per image (B,).
            prompt: (1 or B, T, width).

        Returns:
            (B, C, h, w) in float32 (float64 for a float64 UNet), computed so from the last norm on.
        """
        batch = latents.shape[0]
        steps = torch.as_tensor(timesteps, device=latents.device).expand(batch)
        prompt = self.prompt_clean if prompt is None else prompt
        dtype = _dtype(self.unet)
        states = prompt.to(dtype).expand(batch, -1, -1)
        output = self.unet(latents.to(dtype), steps, encoder_hidden_states=states).sample
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.prediction_type == "v_prediction":
            return epsilon_from_velocity(latents, output, self.alphas_cumprod[steps])
        return output

    def set_checkpointing(self, on: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them; gradients are the same.

        To be called after adapters are injected: a recomputed layer then works under the routing and the set of its
        first run, whatever has run on the same weights since.
        """
        switch = switch_of(self) if on else None
        for network in filter(None, (self.unet, self.vae, self.decoder)):
            if on:
                network.enable_gradient_checkpointing(*[switch.checkpoint] if switch else [])
            else:
                network.disable_gradient_checkpointing()
        if type(self.vae.encoder).__name__ == "EncoderTiny":
            # It leaves the shift of its input to [0, 1] out where it recomputes (diffusers 0.42, vae.py).
            self.vae.encoder.gradient_checkpointing = False

    def save(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, saved_of: str | None = None
    ) -> None:
        """Write the backbone as a diffusers folder with the prompt embeddings beside it.

        Adapters are left out; while `merged` is open the weights are the merged ones. A decoder
        beside the base's own autoencoder is no part of the folder.

        Args:
            folder: made if it is not there.
            dtype: what floating-point weights are stored as; default as they are.
            saved_of: adapter set whose modules_to_save replace the originals.
        """
        from diffusers import DDPMScheduler

        target = Path(folder)
        save_network(target / "vae", self.vae, dtype=dtype, saved_of=saved_of)
        save_network(target / "unet", self.unet, dtype=dtype, saved_of=saved_of)
        start, end = self.betas
        DDPMScheduler(
            beta_start=start, beta_end=end, beta_schedule="scaled_linear", prediction_type=self.prediction_type
        ).save_config(target / "scheduler")
        metadata = {"base_id": self.base_id} | ({} if self.prompt is None else {"prompt": self.prompt})
        save_tensors(target / PROMPTS_FILE, self.prompts, metadata)


def load_backbone(
    source: str | os.PathLike[str] | Sequence[str] = "tiny",
    *,
    decoder: str | os.PathLike[str] | Sequence[str] | None = None,
    prompts: Mapping[str, str] | Mapping[str, Tensor] | None = None,
    dtype: str | torch.dtype | None = None,
) -> Backbone:
    """Load a backbone.

    Args:
        source: a preset ("tiny" and "tiny-fidelity" are in the package; "sd21", "sd-turbo" are hub ids tried in
            order), a local diffusers folder, a hub id, a list of folders and ids tried in order, or "random:sd21" and
            the like for random weights in a published model's shapes.
        decoder: an AutoencoderTiny that decodes in place of the base's own autoencoder: "taesd", "tiny" (in the
            package, for the base of that name), a folder, a hub id, a list of them, or "random:taesd".
            None: the base's own.
        prompts: texts for "clean" and "degraded" in place of the fixed prompts, which needs the base's text encoder; or
            both embeddings, which needs none.
        dtype: what the frozen weights are stored as, "float32" (default), "bfloat16" or "float16". What the class keeps
            in float32 stays so.

    Raises:
        WeightsError: nothing could be loaded; the message names everything that was tried and why.
        ConfigError: a scheduler, UNet, autoencoder or decoder that a one-step generator cannot use.
    """
    storage = _resolve_dtype(dtype)
    origin = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if name.startswith("random:"):
            backbone = random_backbone(name.removeprefix("random:"), decoder=decoder is not None)
            return backbone.to(storage) if storage is not None else backbone
        if name in SHIPPED_BASES:
            source = package_weights(name)
    small = load_decoder(decoder) if decoder is not None else None

    def read(folder: Path, name: str) -> Backbone:
        parts = read_base(folder)
        embeddings: dict[str, Any] = dict(prompts or {})
        if set(embeddings) != {"clean", "degraded"} or not all(isinstance(one, Tensor) for one in embeddings.values()):
            embeddings = read_prompts(folder, name, embeddings)
        text = (prompts or {}).get("clean", cached_prompt(folder))
        return Backbone(
            **parts._asdict(),
            prompts=embeddings,
            decoder=small,
            base_id=read_base_id(folder, name),
            source=origin or name,
            prompt=text if isinstance(text, str) else None,
        )

    backbone = first_readable(source, read, "base model")
    return backbone.to(storage) if storage is not None else backbone


def load_decoder(source: str | os.PathLike[str] | Sequence[str]) -> nn.Module:
    """Load an AutoencoderTiny that decodes in place of a base's own autoencoder; see `load_backbone`."""
    if source == "random:taesd":
        from diffusers import AutoencoderTiny

        return AutoencoderTiny(**TAESD)
    if source == "tiny":
        source = package_weights("tiny") / "decoder"
    return first_readable(source, lambda folder, _: read_decoder(folder), "decoder")


def _resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in _DTYPES.values():
        raise ConfigError(f"dtype of the base: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    return chosen


def random_backbone(name: str, *, decoder: bool = False) -> Backbone:
    """Make a backbone with the shapes of a published model and random weights.

    Args:
        name: "sd21", "sd-turbo", or "small" for tests.
        decoder: decode with a random AutoencoderTiny of TAESD's shape.

    Raises:
        ConfigError: an unknown name.
    """
    shapes = architecture(name)
    small = load_decoder("random:taesd") if decoder else None
    return build_backbone(shapes.unet, shapes.vae, tokens=shapes.tokens, decoder=small, base_id=f"random:{name}")


def build_backbone(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    *,
    tokens: int = 1,
    decoder: nn.Module | None = None,
    base_id: str = "custom",
) -> Backbone:
    """Make a backbone with random weights from diffusers configs, to be trained or tested.

    Args:
        unet: settings of UNet2DConditionModel.
        vae: settings of AutoencoderTiny, or of AutoencoderKL when it has "block_out_channels".
        tokens: length of the two prompt embeddings, which are random too.
        decoder: see `Backbone`.
        base_id: what adapters trained on it record as their base.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    vae_class = AutoencoderKL if "block_out_channels" in vae else AutoencoderTiny
    network = UNet2DConditionModel(**unet)
    width = network.config.cross_attention_dim
    prompts = {name: torch.randn(1, tokens, width) for name in ("clean", "degraded")}
    autoencoder = vae_class(**vae)
    if isinstance(autoencoder, AutoencoderTiny):
        _initialize_tiny(autoencoder)
    return Backbone(network, autoencoder, prompts=prompts, decoder=decoder, base_id=base_id)


def _factor(vae: Any) -> int:
    channels = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(channels) - 1)


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


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


def save_network(folder: Path, network: Any, *, dtype: torch.dtype | None = None, saved_of: str | None = None) -> None:
    """Write one of diffusers' networks as a folder of its own, without its adapters."""
    network.save_config(folder)
    _drop_unknown_keys(folder / "config.json", type(network))
    plain = plain_state_dict(network, name=saved_of)
    state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in plain.items()}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})


def _drop_unknown_keys(path: Path, kind: type[nn.Module]) -> None:
    """AutoencoderTiny writes a key into its config that it warns about at every load."""
    known = inspect.signature(kind.__init__).parameters
    config = {key: value for key, value in json.loads(path.read_text()).items() if key in known or key[0] == "_"}
    write_text(path, json.dumps(config, indent=2) + "\n")
