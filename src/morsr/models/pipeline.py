"""MoRPipeline: the one-step generator as a pipeline of diffusers, for those who expect to call one."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from morsr.errors import ConfigError
from morsr.models.generator import OneStepGenerator
from morsr.models.loading import load_generator
from morsr.models.restorer import Restorer


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
        cls, name_or_path: str | os.PathLike[str] = "tiny", *, base: str | os.PathLike[str] | None = None
    ) -> MoRPipeline:
        """Load a shipped preset, an adapters file, a folder that holds one, or a training checkpoint.

        Raises:
            WeightsError: missing or damaged weights, or adapters of another base.
        """
        return cls(load_generator(name_or_path, base=base))

    @torch.no_grad()
    def __call__(
        self, image: Any, *, scale: float = 4.0, output_type: str = "pil", return_dict: bool = True, **options: Any
    ) -> ImagePipelineOutput | tuple[Any]:
        """Restore one image or a batch of equal size.

        Args:
            image: what `Restorer` takes: path, PIL image, numpy array, or tensor (B, 3, h, w) in [0, 1].
            scale: enlargement along each axis.
            output_type: "pil" (a list), "np" (B, H, W, 3) or "pt" (B, 3, H, W), values in [0, 1].
            return_dict: give an ImagePipelineOutput instead of a tuple.
            options: further options of `Restorer`, such as tile, color, generative or budget.

        Raises:
            ConfigError: another output type.
            InputError: an image that cannot be read.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ConfigError(f"output_type: expected 'pil', 'np' or 'pt', got {output_type!r}")
        restorer = Restorer(self.generator, device=self.device)
        tensor = image if isinstance(image, torch.Tensor) else self._to_tensor(image)
        restored = restorer(tensor, scale=scale, **options)
        if output_type == "pt":
            images: Any = restored
        else:
            images = restored.permute(0, 2, 3, 1).cpu().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @staticmethod
    def _to_tensor(image: Any) -> torch.Tensor:
        from morsr.models.picture import read_picture

        return read_picture(image).rgb
