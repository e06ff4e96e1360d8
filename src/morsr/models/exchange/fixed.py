"""The routing of one image, fixed, and the model with it folded into its weights: a plain diffusers folder.

Under a fixed routing a mixture of ranks is an ordinary LoRA, and folded into the weights it is no adapter at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from morsr.adapters import merged
from morsr.errors import ConfigError
from morsr.imaging.files import read_planes
from morsr.models.generator import OneStepGenerator
from morsr.models.saving import write_description


def fix_routing(
    generator: OneStepGenerator, *, image: Any = None, scores: Sequence[float] | None = None, strength: float = 1.0
) -> dict[str, float]:
    """Set the one routing that is to be exported, from an image or from degradation scores.

    Args:
        generator: its adapters keep the routing.
        image: what `read_planes` takes; scored by the model's own estimator.
        scores: one number in [0, 1] per score of the estimator, in its order; instead of an image.
        strength: factor on the gates of the routed ranks.

    Returns:
        The scores by name; empty where nothing is routed.

    Raises:
        ConfigError: not one of image and scores for a routed model, any of them for another, or scores that do not fit.
    """
    adapters = generator.adapters
    if adapters is None or not adapters.is_routed:
        if image is not None or scores is not None or strength != 1.0:
            raise ConfigError("this model routes nothing: image, scores and strength have no effect")
        return {}
    names = adapters.score_names or tuple(f"score{index}" for index in range(adapters.router.num_scores))
    if (image is None) == (scores is None):
        raise ConfigError(f"give either an image or the {len(names)} scores {', '.join(names)}")
    adapters.strength = strength
    if scores is None:
        estimated = generator.route(read_planes(image)[:1].to(generator.device))
        scores = estimated.scores[0].tolist() if estimated is not None else []
    elif len(scores) != len(names) or not all(0 <= score <= 1 for score in scores):
        raise ConfigError(f"scores: expected {len(names)} numbers in [0, 1] ({', '.join(names)}), got {list(scores)}")
    else:
        adapters.route(torch.tensor([list(scores)], dtype=torch.float32, device=generator.device))
    return dict(zip(names, scores, strict=True))


def export_diffusers(folder: str | os.PathLike[str], generator: OneStepGenerator) -> Path:
    """Write the present routing, folded into the weights, as a diffusers folder with `vae/`, `unet/`, `scheduler/`.

    Diffusers loads each part by itself; `Restorer.from_pretrained` loads the folder as a model without adapters.

    Raises:
        InputError: no routing is set.
    """
    folder, adapters = Path(folder).expanduser(), generator.adapters
    name = adapters.name if adapters is not None else None
    with merged(generator.base, name) if adapters is not None else contextlib.nullcontext():
        generator.base.save(folder, name=name)
    description = {
        "base": ".",
        "estimator": None,
        "one_step": generator.one_step.to_dict(),
        "prompt": generator.base.prompt,
    }
    write_description(folder, description, adapted=False)
    return folder
