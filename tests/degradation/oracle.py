"""basicsr 1.4.2 as the reference of the degradation tests: its operators, and our chain made of them."""

import importlib
import math
import random
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional
from torch import Tensor

from morsr.degradation.parameters import BlurParameters, DegradationParameters
from morsr.degradation.recipe import DegradationRecipe
from morsr.degradation.stages import BlurRecipe, StageRecipe
from morsr.functional.kernels import KERNEL_KINDS
from morsr.functional.kernels import filter_images as ours

# basicsr imports a module that torchvision has no longer; one function of it is used.
_alias: Any = types.ModuleType("torchvision.transforms.functional_tensor")
_alias.rgb_to_grayscale = torchvision.transforms.functional.rgb_to_grayscale
sys.modules.setdefault(_alias.__name__, _alias)
pytest.importorskip("basicsr", reason="the reference operators: pip install 'morsr[reference]'")

OPERATORS, UTILS, FILTER = (
    importlib.import_module(f"basicsr.{name}") for name in ("data.degradations", "utils", "utils.img_process_util")
)
SIDE = 21


def diff_jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """basicsr's JPEG; a copy, since it overwrites the quality that it is given, and returns a permuted view."""
    return UTILS.DiffJPEG(differentiable=False)(images.clamp(0, 1), quality=quality.clone()).contiguous()


def jpeg_tables(quality: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of basicsr's JPEG: unrounded, and luma transposed."""
    factor = torch.tensor([UTILS.diffjpeg.quality_to_factor(float(value)) for value in quality]).view(-1, 1, 1)
    return tuple(torch.as_tensor(table) * factor for table in (UTILS.diffjpeg.y_table, UTILS.diffjpeg.c_table))  # type: ignore[return-value]


def filter_images(images: Tensor, made: Tensor) -> Tensor:
    """basicsr's filter; ours where an image is too small for the mirrored border of basicsr's."""
    return (FILTER.filter2D if min(images.shape[-2:]) > SIDE // 2 else ours)(images, made)


def kernels(blur: BlurParameters) -> Tensor:
    """(B, 21, 21) float32 kernels of drawn parameters, by basicsr's formulas."""
    made = []
    for row in blur.rows():
        size, kind = row["size"], row["kind"]
        shape = {"sig_x": row["sigma_x"], "sig_y": row["sigma_y"], "theta": row["rotation"]}
        shape["isotropic"] = kind in ("iso", "generalized_iso", "plateau_iso")
        if kind == "none":
            kernel, size = np.ones((1, 1)), 1
        elif kind == "sinc":
            kernel = OPERATORS.circular_lowpass_kernel(row["cutoff"], size)
        elif kind in ("iso", "aniso"):
            kernel = OPERATORS.bivariate_Gaussian(size, **shape)
        elif kind.startswith("generalized"):
            kernel = OPERATORS.bivariate_generalized_Gaussian(size, **shape, beta=row["beta"])
        else:
            kernel = OPERATORS.bivariate_plateau(size, **shape, beta=row["beta"])
        made.append(np.pad(kernel, (SIDE - size) // 2))
    return torch.from_numpy(np.stack(made)).to(torch.float32)


def apply(hr: Tensor, parameters: DegradationParameters, *, scale: int = 4) -> Tensor:
    """The chain of drawn parameters without noise, one image at a time."""
    made = []
    height, width = hr.shape[-2:]
    for place, row in enumerate(parameters.rows()):
        first, second, final = row["first"], row["second"], row["final"]
        quality = [torch.tensor([stage["jpeg_quality"]]) for stage in (first, second)]
        image = UTILS.USMSharp()(hr[place, None]) if row["sharpen"] else hr[place, None]
        one = parameters[place]
        image = filter_images(image, kernels(one.first.blur))
        image = F.interpolate(image, scale_factor=first["resize_scale"], mode=first["resize_mode"])
        image = filter_images(diff_jpeg(image, quality[0]), kernels(one.second.blur))
        size = tuple(int(side / scale * second["resize_scale"]) for side in (height, width))
        image = F.interpolate(image, size=size, mode=second["resize_mode"]).clamp(0, 1)
        if not final["jpeg_last"]:
            image = diff_jpeg(image, quality[1])
        image = F.interpolate(image, size=(height // scale, width // scale), mode=final["resize_mode"])
        image = filter_images(image, kernels(one.final.blur))
        if final["jpeg_last"]:
            image = diff_jpeg(image, quality[1])
        made.append(torch.clamp((image * 255).round(), 0, 255) / 255)
    return torch.cat(made)


class Chain:
    """Real-ESRGAN's training chain on basicsr's own random functions, for distributions and speed.

    Kernels are drawn per image, every other draw is shared by the whole batch.

    Source: basicsr/data/realesrgan_dataset.py (kernels), basicsr/models/realesrgan_model.py, feed_data (the rest).
    """

    def __init__(self, recipe: DegradationRecipe, *, scale: int = 4) -> None:
        self.recipe, self.scale = recipe, scale

    def _kernel(self, blur: BlurRecipe, final: bool) -> np.ndarray:
        size = random.choice(range(blur.sizes[0], blur.sizes[1] + 1, 2))
        if final and np.random.uniform() >= self.recipe.final_sinc_probability:
            return np.pad(np.ones((1, 1)), SIDE // 2)
        if final or np.random.uniform() < blur.sinc_probability:
            low = math.pi / 3 if final or size < 13 else math.pi / 5
            kernel = OPERATORS.circular_lowpass_kernel(np.random.uniform(low, math.pi), size)
        else:
            kernel = OPERATORS.random_mixed_kernels(
                KERNEL_KINDS[:6], blur.kinds, size, blur.sigma, blur.sigma, [-math.pi, math.pi],
                blur.beta_generalized, blur.beta_plateau,
            )  # fmt: skip
        return np.pad(kernel, (SIDE - size) // 2)

    def _blur(self, image: Tensor, blur: BlurRecipe, *, final: bool = False) -> Tensor:
        made = np.stack([self._kernel(blur, final) for _ in range(len(image))])
        return filter_images(image, torch.from_numpy(made).to(image))

    @torch.no_grad()
    def __call__(self, hr: Tensor) -> Tensor:
        """Degrade (B, 3, H, W) in [0, 1] to (B, 3, H // scale, W // scale)."""
        recipe, (height, width) = self.recipe, hr.shape[-2:]
        first, second = recipe.first, recipe.second
        lr_size = (height // self.scale, width // self.scale)
        image = self._blur(hr, first.blur)
        image = F.interpolate(image, scale_factor=self._factor(first), mode=self._mode())
        image = self._jpeg(self._noise(image, first), first)
        if np.random.uniform() < second.blur.probability:
            image = self._blur(image, second.blur)
        factor = self._factor(second)
        size = (int(height / self.scale * factor), int(width / self.scale * factor))
        image = self._noise(F.interpolate(image, size=size, mode=self._mode()), second)
        last = np.random.uniform() < recipe.jpeg_last_probability
        image = image if last else self._jpeg(image, second)
        image = self._blur(F.interpolate(image, size=lr_size, mode=self._mode()), first.blur, final=True)
        image = self._jpeg(image, second) if last else image
        return torch.clamp((image * 255).round(), 0, 255) / 255

    @staticmethod
    def _factor(stage: StageRecipe) -> float:
        resize = stage.resize
        low, high = random.choices(
            [(1.0, resize.range[1]), (resize.range[0], 1.0), (1.0, 1.0)], [resize.up, resize.down, resize.keep]
        )[0]
        return float(np.random.uniform(low, high))

    @staticmethod
    def _mode() -> str:
        return random.choice(["area", "bilinear", "bicubic"])

    @staticmethod
    def _noise(image: Tensor, stage: StageRecipe) -> Tensor:
        noise = stage.noise
        if np.random.uniform() < noise.gaussian_probability:
            return OPERATORS.random_add_gaussian_noise_pt(image, noise.sigma, noise.gray_probability, True, False)
        return OPERATORS.random_add_poisson_noise_pt(image, noise.poisson_scale, noise.gray_probability, True, False)

    @staticmethod
    def _jpeg(image: Tensor, stage: StageRecipe) -> Tensor:
        return diff_jpeg(image, torch.empty(len(image)).uniform_(*stage.jpeg))
