"""MoRPipeline: the one-step generator as a pipeline of diffusers, for those who expect to call one."""

from __future__ import annotations

import json
import os
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL.Image import Image

from morsr.errors import ConfigError
from morsr.files import write_text
from morsr.models.generator import OneStepGenerator
from morsr.models.loading import load_generator
from morsr.models.picture import read_picture
from morsr.models.restorer import Restorer
from morsr.models.saving import save_generator


class MoRPipeline(DiffusionPipeline):
    """A diffusers pipeline over the parts of a one-step generator; it restores images and takes no prompt.

    Args:
        generator: a loaded generator; the pipeline's one component, so that `.to` moves all of it. `vae` and `unet` are
            its networks with the adapters in place.

    Example:
        >>> pipeline = MoRPipeline.from_pretrained("tiny")
        >>> pipeline(torch.rand(1, 3, 8, 8), output_type="pt").images.shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(self, generator: OneStepGenerator) -> None:
        super().__init__()
        self.register_modules(generator=generator)

    @property
    def vae(self) -> torch.nn.Module:
        """The autoencoder, its encoder adapted."""
        return self.generator.backbone.vae

    @property
    def unet(self) -> torch.nn.Module:
        """The adapted UNet."""
        return self.generator.backbone.unet

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name_or_path: str | os.PathLike[str] = "tiny",
        *,
        base: str | os.PathLike[str] | None = None,
        decoder: str | os.PathLike[str] | None = None,
        prompt: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **hub: Any,
    ) -> MoRPipeline:
        """Load a shipped preset, an adapters file, a saved folder or its hub id, or a training checkpoint.

        Args:
            name_or_path, base, decoder, prompt, hub: as for `Restorer.from_pretrained`.
            torch_dtype: what the networks' weights are turned into; float32 by default.

        Raises:
            WeightsError: missing or damaged weights, or adapters of another base.
        """
        pipeline = cls(load_generator(name_or_path, base=base, decoder=decoder, prompt=prompt, **hub))
        if torch_dtype is not None:
            pipeline.to(torch_dtype)
        return pipeline

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, include_base: bool | None = None
    ) -> None:
        """Write the folder that `from_pretrained` reads, of this class and of `Restorer` alike.

        Raises:
            InputError, ConfigError: a folder that is a file, or parts that cannot be described.
        """
        folder = save_generator(save_directory, self.generator, include_base=include_base)
        index = {"_class_name": type(self).__name__, "_diffusers_version": diffusers.__version__}
        write_text(folder / self.config_name, json.dumps(index, indent=2) + "\n")

    @torch.no_grad()
    def __call__(
        self, image: Any, *, scale: float = 4.0, output_type: str = "pil", return_dict: bool = True, **options: Any
    ) -> ImagePipelineOutput | tuple[Any]:
        """Restore one image, a list of images, or a batch of equal size.

        Args:
            image: what `Restorer` takes: path, PIL image, numpy array, or tensor (B, 3, h, w) in [0, 1]; or a list of
                these, restored one by one.
            scale: enlargement along each axis.
            output_type: "pil" (a list), "np" (B, H, W, 3) or "pt" (B, 3, H, W), values in [0, 1]; a list of arrays or
                tensors of batch 1 where a list of images was given. A PIL image comes back in its own mode.
            return_dict: give an ImagePipelineOutput instead of a tuple.
            options: further options of `Restorer`, such as tile, color, generative or budget.

        Raises:
            ConfigError: another output type, an option that has no effect, or the routing "sequence" of a single image.
            InputError: an image that cannot be read.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ConfigError(f"output_type: expected 'pil', 'np' or 'pt', got {output_type!r}")
        if options.get("return_routing"):
            raise ConfigError("return_routing: a pipeline returns images; ask Restorer for the routing")
        several = isinstance(image, (list, tuple))
        if options.get("routing") == "sequence" and not several:
            raise ConfigError("routing 'sequence': expected a list of frames, for nothing is kept from call to call")
        half = self.generator.dtype in (torch.float16, torch.bfloat16)
        restorer = Restorer(self.generator, device=self.device, dtype=self.generator.dtype if half else "auto")
        if several:
            parts = [self._restore(restorer, one, output_type, scale, options) for one in image]
            images: Any = [picture for part in parts for picture in part] if output_type == "pil" else parts
        else:
            images = self._restore(restorer, image, output_type, scale, options)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _restore(self, restorer: Restorer, image: Any, output_type: str, scale: float, options: dict[str, Any]) -> Any:
        if output_type == "pil" and isinstance(image, Image):
            return [restorer(image, scale=scale, **options)]
        tensor = image if isinstance(image, torch.Tensor) else read_picture(image).rgb
        restored = restorer(tensor, scale=scale, **options)
        if output_type == "pt":
            return restored
        array = restored.permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
