"""From a name, a folder or a hub id to a base of the right family."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from morsr.errors import ConfigError
from morsr.functional.precision import float_type
from morsr.models.bases.base import Architecture, Base
from morsr.models.bases.decoder import with_phases
from morsr.models.bases.flux1 import Flux1
from morsr.models.bases.flux2 import Flux2
from morsr.models.bases.reading import first_readable, read_index, read_network, read_prompts, saved_notes
from morsr.models.bases.sana import Sana
from morsr.models.bases.sd3 import StableDiffusion3
from morsr.models.bases.sdxl import StableDiffusionXL
from morsr.models.bases.stable_diffusion import StableDiffusion
from morsr.models.bases.z_image import ZImage

SHIPPED_BASES = ("tiny",)
"""Bases that the package brings along."""

FAMILIES: tuple[type[Base], ...] = (
    StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux1, Flux2, ZImage, Sana
)  # fmt: skip
"""Every family of bases that a folder may be of."""

ARCHITECTURES: Mapping[str, tuple[type[Base], Architecture]] = {
    shapes.name: (family, shapes) for family in FAMILIES for shapes in family.published
}
"""Family and shapes of every published model by name."""


def package_weights(name: str) -> Path:
    """The folder of a preset shipped in the package, such as "tiny"."""
    return Path(str(resources.files("morsr"))) / "weights" / name


def load_base(
    source: Base | str | os.PathLike[str] | Sequence[str] = "tiny",
    *,
    prompts: Mapping[str, str] | Mapping[str, Tensor] | None = None,
    dtype: str | torch.dtype | None = None,
) -> Base:
    """Load a base.

    Args:
        source: a preset ("tiny" is in the package; "sd21", "sd-turbo" are hub ids tried in order), a local diffusers
            folder, a hub id (org/name or org/name@revision), a list of folders and ids tried in order, or "random:sd21"
            and the like for random weights in a published model's shapes; or a base, which is returned.
        prompts: texts for "clean" and "degraded" instead of the fixed prompts, which needs the base's text encoder; or
            both embeddings, which needs none.
        dtype: what the frozen weights are stored as, "float32" (default), "bfloat16" or "float16". What the class keeps
            in float32 stays so.

    Raises:
        WeightsError: nothing could be loaded; the message names everything that was tried and why.
        ConfigError: a scheduler, UNet or autoencoder that a one-step generator cannot use.
    """
    if isinstance(source, Base):
        if dtype is not None or any(isinstance(one, str) for one in (prompts or {}).values()):
            raise ConfigError("base: one of your own has its precision and prompts; leave base_dtype and prompts out")
        if prompts:
            source.set_prompts(prompts)  # type: ignore[arg-type]
        return source
    storage = float_type(dtype or "float32")
    if odd := sorted({*(prompts or {})} - {"clean", "degraded", "clean_pooled", "degraded_pooled"}):
        raise ConfigError(f"prompts: expected clean and degraded, got {odd[0]}")
    origin = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    if origin is not None and origin.startswith("random:"):
        return random_base(origin.removeprefix("random:")).to(storage)
    if origin in SHIPPED_BASES:
        source = package_weights(origin)

    def read(folder: Path, name: str) -> Base:
        index = read_index(folder)
        kind = index.get("_class_name", StableDiffusion.pipeline)
        family: Any = next((one for one in FAMILIES if one.pipeline == kind), None)
        if family is None:
            known = ", ".join(one.pipeline for one in FAMILIES)
            raise ConfigError(f"{folder}: no base is known for {kind}; expected a folder of {known}")
        schedule = family.schedule(folder / "scheduler" / "scheduler_config.json")
        network = read_network(folder / family.network_name, family.network_class)
        vae = with_phases(read_network(folder / "vae", *family.autoencoders))
        embeddings: dict[str, Any] = dict(prompts or {})
        if not isinstance(embeddings.get("degraded"), Tensor):
            embeddings = read_prompts(folder, name, embeddings, family=family)
        notes = saved_notes(folder)
        text = (prompts or {}).get("clean", notes.get("prompt"))
        found = family(
            network,
            vae,
            **schedule,
            prompts=embeddings,
            base_id=notes.get("base_id", name),
            source=origin or name,
            prompt=text if isinstance(text, str) else None,
        )
        found.distilled = bool(index.get("is_distilled", family.distilled))
        return found

    return first_readable(source, read).to(storage)


def random_base(name: str) -> Base:
    """Make a base with the shapes of a published model and random weights.

    Args:
        name: "sd21", "sdxl", "sd3", "flux2-klein" and the others of `ARCHITECTURES`, or "small" for tests.

    Raises:
        ConfigError: an unknown name.
    """
    import diffusers

    if name not in ARCHITECTURES:
        raise ConfigError(f"random base: expected one of {', '.join(ARCHITECTURES)}, got {name!r}")
    family, shapes = ARCHITECTURES[name]
    network = getattr(diffusers, family.network_class)(**shapes.network)
    vae = getattr(diffusers, family.autoencoders[0])(**shapes.vae)
    prompts = {side: torch.randn(1, shapes.tokens, shapes.width) for side in ("clean", "degraded")}
    if family.pooled:
        prompts |= {f"{side}_pooled": torch.randn(1, shapes.pooled) for side in ("clean", "degraded")}
    return family(network, vae, prompts=prompts, base_id=f"random:{name}", **shapes.settings)


def build_base(unet: Mapping[str, Any], vae: Mapping[str, Any], *, tokens: int = 1, base_id: str = "custom") -> Base:
    """Make a base with random weights from diffusers configs, to be trained or tested.

    Args:
        unet: settings of UNet2DConditionModel.
        vae: settings of AutoencoderTiny, or of AutoencoderKL when it has "block_out_channels".
        tokens: length of the two prompt embeddings, which are random too.
        base_id: see `Base`.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

    vae_class = AutoencoderKL if "block_out_channels" in vae else AutoencoderTiny
    network = UNet2DConditionModel(**unet)
    width = network.config.cross_attention_dim
    prompts = {name: torch.randn(1, tokens, width) for name in ("clean", "degraded")}
    autoencoder = vae_class(**vae)
    if isinstance(autoencoder, AutoencoderTiny):
        _initialize_tiny(autoencoder)
    return StableDiffusion(network, autoencoder, prompts=prompts, base_id=base_id)


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
