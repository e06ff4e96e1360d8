"""What the generator, the losses and the files ask of a base model; one subclass per family answers.

z_t = a_t z0 + b_t n. A subclass says what a_t and b_t are, how its network is called, and how its output leads to z0.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from morsr.adapters.inject import plain_state_dict, switch_of
from morsr.errors import ConfigError
from morsr.files import save_tensors, write_text
from morsr.functional.precision import keep_float32, without_autocast

PROMPTS_FILE = "prompt_embeddings.safetensors"
STEPS = 1000


class Condition(NamedTuple):
    """Text as the network wants it. tokens: (1 or B, T, width). pooled: (1 or B, width'), or None."""

    tokens: Tensor
    pooled: Tensor | None = None


class Architecture(NamedTuple):
    """Shapes of a published model, to build it with random weights: for tests, benchmarks and dry runs.

    name: in `random:NAME`. network, vae: settings of diffusers' classes. tokens, width: of a prompt. pooled: width of
    the pooled text vector. settings: further arguments of the family.
    """

    name: str
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    tokens: int
    width: int
    pooled: int = 0
    settings: Mapping[str, Any] = MappingProxyType({})


class Base(nn.Module):
    """A latent diffusion or flow model: images in [−1, 1] on one side, scaled latents on the other.

    Under autocast, or stored in half precision, the noise schedule and the text embeddings stay in float32.

    Args:
        network: predicts noise or velocity; becomes the attribute that `network_name` says.
        vae: a diffusers autoencoder.
        prompts: embeddings "clean" and "degraded", each (1, T, width), and "clean_pooled" and "degraded_pooled",
            (1, width'), where the family has them.
        base_id: what adapters record as their base.
        source: from where `load_base` gets the same base again; None for one that was made by hand, the import path for
            a class of the user's own.
        prompt: text behind the "clean" embedding, where it is known.

    Raises:
        ConfigError: embeddings of the wrong width, latent channels that differ.
    """

    network_name: ClassVar[str] = "transformer"
    pipeline: ClassVar[str] = ""
    """Class of diffusers' pipeline, in model_index.json; its `encode_prompt` makes the text embeddings."""
    network_class: ClassVar[str] = ""
    """Class of diffusers that the network has."""
    autoencoders: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)
    """Classes of diffusers that the autoencoder may have, first that of the published models."""
    text_width: ClassVar[str] = ""
    """Key in the network's config of the width of a text token."""
    targets: ClassVar[tuple[str, ...]] = ()
    """Layers that the adapters of a score network are put on."""
    parametrizations: ClassVar[tuple[str, ...]] = ("epsilon",)
    """Parametrizations of the one step that the family knows."""
    pooled: ClassVar[bool] = False
    """Whether the network takes a pooled text vector too."""
    distilled: bool = False
    """Whether the model takes no guidance; model_index.json may say otherwise than the family."""
    published: ClassVar[tuple[Architecture, ...]] = ()
    """Shapes of published models, for `random:NAME`."""

    vae: Any  # diffusers sets most of their attributes at run time
    prompt_clean: Tensor
    prompt_degraded: Tensor

    def __init__(
        self,
        network: nn.Module,
        vae: nn.Module,
        *,
        prompts: Mapping[str, Tensor],
        base_id: str = "custom",
        source: str | None = None,
        prompt: str | None = None,
    ) -> None:
        super().__init__()
        setattr(self, self.network_name, network)
        if source is None and not type(self).__module__.startswith("morsr."):
            source = f"{type(self).__module__}.{type(self).__qualname__}"
        self.vae, self.base_id, self.source, self.prompt = vae, base_id, source, prompt
        if self.in_channels != self.latent_channels:
            raise ConfigError(
                f"the {self.network_name} takes {self.in_channels} latent channels, "
                f"the autoencoder gives {self.latent_channels}; take both from one model"
            )
        self.set_prompts(prompts)

    # What a family says of itself.

    @classmethod
    def schedule(cls, path: Path) -> dict[str, Any]:
        """Arguments of the class from the config of a scheduler."""
        raise NotImplementedError

    @classmethod
    def embedded(cls, output: Any) -> Condition:
        """Text in what the `encode_prompt` of the family's pipeline gives: (tokens, negative, pooled, negative)."""
        return Condition(output[0], output[2] if cls.pooled else None)

    @property
    def in_channels(self) -> int:
        """Channels of the latents that the network takes."""
        return int(self.denoiser.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the autoencoder gives."""
        return int(self.vae.config.latent_channels)

    @property
    def multiple(self) -> int:
        """Image sides must be a multiple of this many pixels."""
        raise NotImplementedError

    @property
    def feature_widths(self) -> list[int]:
        """Channels of every map that `features` gives."""
        raise NotImplementedError

    def signal(self, t: Tensor | int) -> Tensor:
        """a_t, the factor on z0 in z_t at timesteps 0..999: a number, or one per image (B,)."""
        raise NotImplementedError

    def noised(self, z0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Latents z0 (B, C, h, w) with noise at timesteps t, one or (B,); float32."""
        raise NotImplementedError

    def predict(self, z_t: Tensor, t: Tensor | int, condition: Condition | None = None) -> Tensor:
        """Output of the network: noise, or velocity for a flow. (B, C, h, w), float32.

        Args:
            z_t: (B, C, h, w), any precision.
            t: one integer in 0..999, or one per image (B,).
            condition: default the "clean" one.
        """
        raise NotImplementedError

    def target(self, z0: Tensor, noise: Tensor) -> Tensor:
        """What `predict` should give for latents z0 with this noise."""
        raise NotImplementedError

    def clean_from(self, z_t: Tensor, prediction: Tensor, t: Tensor | int) -> Tensor:
        """Clean latents behind z_t by a prediction, float32."""
        raise NotImplementedError

    def features(self, z_t: Tensor, t: Tensor, condition: Condition | None = None) -> list[Tensor]:
        """Maps (B, C, h, w) inside the network, for a discriminator."""
        raise NotImplementedError

    def scheduler(self) -> Any:
        """diffusers' scheduler of this noise schedule, to be saved."""
        raise NotImplementedError

    # What all families share.

    def clean(self, z_t: Tensor, t: Tensor | int, condition: Condition | None = None) -> Tensor:
        """Clean latents behind z_t by one pass of the network, float32."""
        prediction = self.predict(z_t, t, condition)
        with without_autocast(z_t.device):
            return self.clean_from(z_t, prediction, t)

    def moved(self, z_t: Tensor, prediction: Tensor, t: Tensor, later: Tensor) -> Tensor:
        """Noisy latents at other timesteps (B,), along a prediction for z_t: a step of DDIM, for a flow of Euler."""
        z0 = self.clean_from(z_t, prediction, t)
        level = self.noised(torch.zeros_like(z0), torch.ones_like(z0), t)
        noise = (z_t - self.noised(z0, torch.zeros_like(z0), t)) / level
        return self.noised(z0, noise, later)

    @property
    def denoiser(self) -> Any:
        """The network that predicts noise or velocity."""
        return getattr(self, self.network_name)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prompt_clean.device

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along each axis: 8 for Stable Diffusion, 4 for `tiny`."""
        config = self.vae.config
        return 2 ** (len(getattr(config, "encoder_block_out_channels", None) or config.block_out_channels) - 1)

    @property
    def scaling_factor(self) -> float:
        """What raw latents are multiplied by so that their deviation is about one."""
        return float(self.vae.config.scaling_factor)

    def condition(self, side: str = "clean") -> Condition:
        """The text embedding of a side, "clean" or "degraded"."""
        return Condition(getattr(self, f"prompt_{side}"), getattr(self, f"prompt_{side}_pooled", None))

    @property
    def prompts(self) -> dict[str, Tensor]:
        """The embeddings by name, on the CPU: what a checkpoint caches."""
        found = self.named_buffers(recurse=False)
        return {key.removeprefix("prompt_"): value.cpu() for key, value in found if key.startswith("prompt_")}

    def set_prompts(self, prompts: Mapping[str, Tensor]) -> None:
        """Take other embeddings.

        Raises:
            ConfigError: embeddings that are missing or of the wrong width.
        """
        wanted = ["clean", "degraded"] + (["clean_pooled", "degraded_pooled"] if self.pooled else [])
        if missing := [name for name in wanted if name not in prompts]:
            raise ConfigError(f"prompt embeddings: expected {', '.join(wanted)}, got no {', '.join(missing)}")
        width = self.denoiser.config[self.text_width]
        for name in wanted:
            value = prompts[name]
            if name in ("clean", "degraded") and (value.ndim != 3 or value.shape[-1] != width):
                raise ConfigError(
                    f"prompt embedding {name!r}: expected (1, tokens, {width}) for the {self.network_name} of "
                    f"{self.base_id}, got {tuple(value.shape)}, made for another base"
                )
            device = getattr(self, f"prompt_{name}", value).device
            self.register_buffer(f"prompt_{name}", value.to(device, torch.float32))

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [−1, 1] to scaled latents; the mean of the posterior, never a sample."""
        raw = self.vae.encode(images.to(dtype_of(self.vae)), return_dict=False)[0]
        raw, shift = raw if isinstance(raw, Tensor) else raw.mean, getattr(self.vae.config, "shift_factor", None)
        return (raw - shift if shift else raw) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W), nominally in [−1, 1], not clamped."""
        raw = latents / self.scaling_factor + (getattr(self.vae.config, "shift_factor", None) or 0.0)
        return self.vae.decode(raw.to(dtype_of(self.vae))).sample

    def set_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them; gradients are the same.

        A network whose class cannot recompute (AutoencoderDC) keeps them.
        To be called after adapters are injected: a recomputed layer then works under the routing and the set of its
        first run, whatever has run on the same weights since.
        """
        switch = switch_of(self)
        for network in (self.denoiser, self.vae):
            if network._supports_gradient_checkpointing:
                network.enable_gradient_checkpointing(*[switch.checkpoint] if switch else [])
        if type(self.vae.encoder).__name__ == "EncoderTiny":
            # It leaves the shift of its input to [0, 1] out where it recomputes (diffusers 0.42, vae.py).
            self.vae.encoder.gradient_checkpointing = False

    def save(self, folder: str | os.PathLike[str], *, name: str | None = None) -> None:
        """Write the base as a diffusers folder with the prompt embeddings beside it.

        Adapters are left out; while `merged` is open the weights are the merged ones.

        Args:
            folder: made if it is not there.
            name: adapter set whose modules_to_save replace the originals.
        """
        target = Path(folder)
        save_network(target / "vae", self.vae, name=name)
        save_network(target / self.network_name, self.denoiser, name=name)
        self.scheduler().save_config(target / "scheduler")
        index = {"_class_name": self.pipeline, "is_distilled": self.distilled}
        write_text(target / "model_index.json", json.dumps(index, indent=2) + "\n")
        metadata = {"base_id": self.base_id} | ({} if self.prompt is None else {"prompt": self.prompt})
        save_tensors(target / PROMPTS_FILE, self.prompts, metadata)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Base:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_float32(fn), recurse=False)


def dtype_of(network: nn.Module) -> torch.dtype:
    """What a network's weights are stored as."""
    return next(network.parameters()).dtype


class _Float32(nn.Module):
    """Mixin: weights are not halved by `.to`, and the forward runs in their precision, autocast or not."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keep_float32(fn), recurse)

    def forward(self, inputs: Tensor) -> Tensor:
        with without_autocast(inputs.device):
            return super().forward(inputs.to(self.weight.dtype))  # type: ignore[arg-type]


class Float32Conv2d(_Float32, nn.Conv2d):
    """Conv2d in float32; takes any precision and gives float32."""

    computes_like = nn.Conv2d


class Float32Linear(_Float32, nn.Linear):
    """Linear in float32; takes any precision and gives float32."""

    computes_like = nn.Linear


class Float32GroupNorm(_Float32, nn.GroupNorm):
    """GroupNorm in float32; takes any precision and gives float32."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Float32Conv2d,
    nn.Linear: Float32Linear,
    nn.GroupNorm: Float32GroupNorm,
}


def to_float32(layer: Any) -> None:
    """Let a convolution, linear layer or group norm run in float32 from now on; other modules stay as they are.

    Weights in half precision become float32, of the values that they have.
    """
    if type(layer) in _KINDS:
        layer.__class__ = _KINDS[type(layer)]
        for parameter in layer.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()


def save_network(folder: Path, network: Any, *, name: str | None = None) -> None:
    """Write one of diffusers' networks as a folder, without its adapters; `name`: see `Base.save`."""
    network.save_config(folder)
    path = folder / "config.json"
    # AutoencoderTiny writes a key into its config that it warns about at every load.
    known = inspect.signature(type(network).__init__).parameters
    config = {key: value for key, value in json.loads(path.read_text()).items() if key in known or key[0] == "_"}
    write_text(path, json.dumps(config, indent=2) + "\n")
    plain = plain_state_dict(network, name=name)
    state = {key: value.detach().cpu().contiguous() for key, value in plain.items()}
    save_tensors(folder / "diffusion_pytorch_model.safetensors", state, {"format": "pt"})
