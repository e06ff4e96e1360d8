"""The same degradation chain on basicsr's operators: for parity, and for those who need published training exactly."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.degradation.basicsr_compat import import_basicsr
from morsr.degradation.keys import noise_seed
from morsr.degradation.parameters import BlurParameters, DegradationParameters
from morsr.degradation.pipeline import check_arguments, intermediate_sizes
from morsr.degradation.recipe import DegradationRecipe
from morsr.degradation.stages import BlurRecipe, StageRecipe
from morsr.errors import ConfigError
from morsr.functional.kernels import KERNEL_KINDS, filter_images

CANVAS = 21


@torch.no_grad()
def apply_reference(hr: Tensor, parameters: DegradationParameters, *, scale: int = 4) -> Tensor:
    """What `morsr.degradation.apply` does, by basicsr's operators on one image at a time.

    Two operators differ on purpose from ours: basicsr's JPEG leaves its tables unrounded and transposes the luma table,
    and its noise fields come from another use of the generator. Where an image has become too small for the mirrored
    border of basicsr's filter (a side under 11 pixels), ours takes its place.

    Args:
        hr: (B, 3, H, W) in [0, 1].
        parameters: B sets.
        scale: HR pixels per LR pixel.

    Returns:
        (B, 3, H // scale, W // scale) float32 in [0, 1].

    Raises:
        InputError: as `morsr.degradation.apply`.
        MissingDependencyError: basicsr is not installed.
    """
    check_arguments(hr, parameters, scale)
    host = parameters.to("cpu")
    blurs = (host.first.blur, host.second.blur, host.final.blur)
    kernels = [reference_kernels(blur).to(hr.device) for blur in blurs]
    results = []
    with torch.autocast(device_type=hr.device.type, enabled=False), _global_generators_kept(hr.device):
        for place, row in enumerate(host.rows()):
            torch.manual_seed(noise_seed(row["key"], 2))
            image = hr[place : place + 1].float()
            results.append(_degrade_one(image, row, [kernel[place : place + 1] for kernel in kernels], scale))
    return torch.cat(results)


def reference_kernels(blur: BlurParameters) -> Tensor:
    """(B, 21, 21) float32 kernels of drawn parameters, by basicsr's formulas.

    Raises:
        MissingDependencyError: basicsr is not installed.
    """
    operators = import_basicsr("data.degradations")
    made = []
    for row in blur.rows():
        size, kind = row["size"], row["kind"]
        shape = {"sig_x": row["sigma_x"], "sig_y": row["sigma_y"], "theta": row["rotation"]}
        isotropic = kind in ("iso", "generalized_iso", "plateau_iso")
        if kind == "none":
            kernel, size = np.ones((1, 1)), 1
        elif kind == "sinc":
            kernel = operators.circular_lowpass_kernel(row["cutoff"], size)
        elif kind in ("iso", "aniso"):
            kernel = operators.bivariate_Gaussian(size, **shape, isotropic=isotropic)
        elif kind.startswith("generalized"):
            kernel = operators.bivariate_generalized_Gaussian(size, **shape, beta=row["beta"], isotropic=isotropic)
        else:
            kernel = operators.bivariate_plateau(size, **shape, beta=row["beta"], isotropic=isotropic)
        made.append(np.pad(kernel, (CANVAS - size) // 2))
    return torch.from_numpy(np.stack(made)).to(torch.float32)


class BasicsrChain:
    """The chain as Real-ESRGAN trains with it: kernels per image, every other draw shared by the whole batch or redrawn
    per image as basicsr's own functions do it, all from Python's, numpy's and torch's global generators.

    Args:
        recipe: ranges and probabilities.
        scale: HR pixels per LR pixel.

    Raises:
        MissingDependencyError: basicsr is not installed.
        ConfigError: a mix of recipes, which basicsr does not know.

    Source: basicsr/data/realesrgan_dataset.py (kernels), basicsr/models/realesrgan_model.py, feed_data (the rest).
    """

    def __init__(self, recipe: DegradationRecipe, *, scale: int = 4) -> None:
        if recipe.mixes:
            raise ConfigError(f"recipe: expected one recipe for basicsr's own chain, got a mix ({recipe.name})")
        self.recipe = recipe
        self.scale = scale
        self.operators = import_basicsr("data.degradations")

    def kernels(self, blur: BlurRecipe, count: int, *, final: bool = False) -> Tensor:
        """(count, 21, 21) random kernels."""
        return torch.from_numpy(np.stack([self._kernel(blur, final) for _ in range(count)])).to(torch.float32)

    def _kernel(self, blur: BlurRecipe, final: bool) -> np.ndarray:
        size = random.choice(range(blur.sizes[0], blur.sizes[1] + 1, 2))
        if final or np.random.uniform() < blur.sinc_probability:
            low = math.pi / 3 if final or size < 13 else math.pi / 5
            if final and np.random.uniform() >= self.recipe.final_sinc_probability:
                return np.pad(np.ones((1, 1)), CANVAS // 2)
            kernel = self.operators.circular_lowpass_kernel(np.random.uniform(low, math.pi), size)
        else:
            kernel = self.operators.random_mixed_kernels(
                KERNEL_KINDS[:6],
                blur.kinds,
                size,
                blur.sigma,
                blur.sigma,
                [-math.pi, math.pi],
                blur.beta_generalized,
                blur.beta_plateau,
            )
        return np.pad(kernel, (CANVAS - size) // 2)

    @torch.no_grad()
    def __call__(self, hr: Tensor) -> Tensor:
        """Degrade (B, 3, H, W) in [0, 1] to (B, 3, H // scale, W // scale)."""
        recipe, (height, width) = self.recipe, hr.shape[-2:]
        lr_size = (height // self.scale, width // self.scale)
        count, device = hr.shape[0], hr.device
        first, second = (self.kernels(stage.blur, count).to(device) for stage in (recipe.first, recipe.second))
        final = self.kernels(recipe.first.blur, count, final=True).to(device)

        image = hr
        if np.random.uniform() < recipe.first.blur.probability:
            image = _filter(hr, first)
        factor = self._factor(recipe.first)
        image = F.interpolate(image, scale_factor=factor, mode=self._mode())
        image = self._jpeg(self._noise(image, recipe.first), recipe.first)
        if np.random.uniform() < recipe.second.blur.probability:
            image = _filter(image, second)
        factor = self._factor(recipe.second)
        size = (int(height / self.scale * factor), int(width / self.scale * factor))
        image = self._noise(F.interpolate(image, size=size, mode=self._mode()), recipe.second)
        if np.random.uniform() < recipe.jpeg_last_probability:
            image = _filter(F.interpolate(image, size=lr_size, mode=self._mode()), final)
            image = self._jpeg(image, recipe.second)
        else:
            image = self._jpeg(image, recipe.second)
            image = _filter(F.interpolate(image, size=lr_size, mode=self._mode()), final)
        return torch.clamp((image * 255).round(), 0, 255) / 255

    @staticmethod
    def _factor(stage: StageRecipe) -> float:
        resize = stage.resize
        choice = random.choices(["up", "down", "keep"], [resize.up, resize.down, resize.keep])[0]
        low, high = {"up": (1.0, resize.range[1]), "down": (resize.range[0], 1.0), "keep": (1.0, 1.0)}[choice]
        return float(np.random.uniform(low, high))

    @staticmethod
    def _mode() -> str:
        return random.choice(["area", "bilinear", "bicubic"])

    def _noise(self, image: Tensor, stage: StageRecipe) -> Tensor:
        noise = stage.noise
        if np.random.uniform() < noise.gaussian_probability:
            return self.operators.random_add_gaussian_noise_pt(image, noise.sigma, noise.gray_probability, True, False)
        return self.operators.random_add_poisson_noise_pt(
            image, noise.poisson_scale, noise.gray_probability, True, False
        )

    @staticmethod
    def _jpeg(image: Tensor, stage: StageRecipe) -> Tensor:
        quality = image.new_zeros(image.shape[0]).uniform_(*stage.jpeg)
        return _diff_jpeg(image.device)(torch.clamp(image, 0, 1), quality=quality).contiguous()


def _filter(image: Tensor, kernel: Tensor) -> Tensor:
    if min(image.shape[-2:]) <= CANVAS // 2:
        return filter_images(image, kernel)
    return import_basicsr("utils.img_process_util").filter2D(image, kernel)


def _degrade_one(image: Tensor, row: dict[str, Any], kernels: list[Tensor], scale: int) -> Tensor:
    first, second, final = row["first"], row["second"], row["final"]
    _, second_size, lr_size = intermediate_sizes(image.shape[-2], image.shape[-1], row, scale)
    if row["sharpen"]:
        image = import_basicsr("utils").USMSharp().to(image.device)(image)
    image = _filter(image, kernels[0])
    image = F.interpolate(image, scale_factor=first["resize_scale"], mode=first["resize_mode"])
    image = _jpeg(_noise(image, first), first)
    if second["blur"]["kind"] != "none":
        image = _filter(image, kernels[1])
    image = _noise(F.interpolate(image, size=second_size, mode=second["resize_mode"]), second)
    if not final["jpeg_last"]:
        image = _jpeg(image, second)
    image = _filter(F.interpolate(image, size=lr_size, mode=final["resize_mode"]), kernels[2])
    if final["jpeg_last"]:
        image = _jpeg(image, second)
    return torch.clamp((image * 255).round(), 0, 255) / 255


def _noise(image: Tensor, stage: dict[str, Any]) -> Tensor:
    operators = import_basicsr("data.degradations")
    level = image.new_tensor([stage["noise_level"]])
    gray = image.new_tensor([float(stage["noise_gray"])])
    if stage["noise_kind"] == "gaussian":
        return operators.add_gaussian_noise_pt(image, level, gray)
    return operators.add_poisson_noise_pt(image, level, gray_noise=gray)


def _jpeg(image: Tensor, stage: dict[str, Any]) -> Tensor:
    # DiffJPEG overwrites the quality tensor it is given, so it gets a new one every time; it returns a permuted view,
    # which filter2D cannot read.
    quality = image.new_tensor([stage["jpeg_quality"]])
    return _diff_jpeg(image.device)(image.clamp(0, 1), quality=quality).contiguous()


@functools.lru_cache(maxsize=4)
def _diff_jpeg(device: torch.device) -> Any:
    return import_basicsr("utils").DiffJPEG(differentiable=False).to(device)


@contextmanager
def _global_generators_kept(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield
