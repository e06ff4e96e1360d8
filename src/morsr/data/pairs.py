"""Pairs in memory for scripts: photographs degraded once per seed, as validation degrades them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from morsr.data.dataset import image_key, to_tensor
from morsr.data.sources import Pair, Source, find_photos
from morsr.degradation import DegradationRecipe, apply


def embedded_benchmark(
    seeds: Iterable[int] = range(5),
    recipe: Any = "realesrgan",
    *,
    sources: Sequence[Source] = ("skimage:eval",),
    multiple: int = 16,
) -> list[Pair]:
    """The benchmark that needs no data: scikit-image's four held-out photographs, degraded with fixed seeds.

    Ordered by photograph, then seed, with stems such as `coffee_s3`.

    Args:
        seeds: one pair per photograph and seed.
        recipe: see `DegradationRecipe.load`.
        sources: lists of other HR photographs.
        multiple: HR sides are cropped to multiples of this.
    """
    recipe, seeds, made = DegradationRecipe.load(recipe), list(seeds), []
    for photo in [photo for source in sources for photo in find_photos(source)]:
        hr, _ = photo.read(multiple=multiple)
        for seed in seeds:
            key = image_key(photo.stem, seed)
            parameters = recipe.sample(torch.tensor([key]))
            lr = apply(to_tensor(hr)[None].float() / 255, parameters)[0]
            stem = f"{photo.stem}_s{seed}" if len(seeds) > 1 else photo.stem
            pixels = lr.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
            made.append(Pair(stem, hr, pixels, photo.stem, parameters, seed, key))
    return made
