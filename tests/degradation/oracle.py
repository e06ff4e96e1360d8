"""basicsr 1.4.2 as the reference of the degradation tests: its operators, and our chain made of them."""

import importlib
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


def degraded(images: Tensor, row: dict[str, Any], blurs: list[Tensor], *, scale: int = 4, noise: bool) -> Tensor:
    """The chain with one set of parameters for a batch, and one kernel per image for each of the three blurs.

    Source: basicsr/models/realesrgan_model.py, feed_data.
    """
    first, second, final = row["first"], row["second"], row["final"]
    height, width = images.shape[-2:]

    def noisy(made: Tensor, stage: dict[str, Any]) -> Tensor:
        if not noise:
            return made.clamp(0, 1)
        add = getattr(OPERATORS, f"add_{stage['noise_kind']}_noise_pt")
        level, gray = (torch.full((len(made),), float(stage[f"noise_{name}"])) for name in ("level", "gray"))
        return add(made, level, gray_noise=gray)

    def compressed(made: Tensor, stage: dict[str, Any]) -> Tensor:
        return diff_jpeg(made, torch.full((len(made),), stage["jpeg_quality"]))

    made = filter_images(UTILS.USMSharp()(images) if row["sharpen"] else images, blurs[0])
    made = F.interpolate(made, scale_factor=first["resize_scale"], mode=first["resize_mode"])
    made = compressed(noisy(made, first), first)
    made = made if second["blur"]["kind"] == "none" else filter_images(made, blurs[1])
    size = tuple(int(side / scale * second["resize_scale"]) for side in (height, width))
    made = noisy(F.interpolate(made, size=size, mode=second["resize_mode"]), second)
    made = made if final["jpeg_last"] else compressed(made, second)
    made = F.interpolate(made, size=(height // scale, width // scale), mode=final["resize_mode"])
    made = filter_images(made, blurs[2])
    made = compressed(made, second) if final["jpeg_last"] else made
    return torch.clamp((made * 255).round(), 0, 255) / 255


def apply(hr: Tensor, parameters: DegradationParameters) -> Tensor:
    """The chain of drawn parameters without noise, one image at a time."""
    blurs = [kernels(part.blur) for part in (parameters.first, parameters.second, parameters.final)]
    rows = enumerate(parameters.rows())
    return torch.cat([degraded(hr[n, None], row, [one[n, None] for one in blurs], noise=False) for n, row in rows])


@torch.no_grad()
def training_chain(hr: Tensor, recipe: DegradationRecipe) -> Tensor:
    """Real-ESRGAN's training chain, for speed: kernels are drawn per image, every other draw is the whole batch's."""
    drawn = recipe.sample(torch.randint(2**62, (len(hr),)))
    blurs = [kernels(part.blur).to(hr) for part in (drawn.first, drawn.second, drawn.final)]
    return degraded(hr, drawn.rows()[0], blurs, noise=True)
