"""The routing of one image, fixed, and the model with it folded into its weights: a plain diffusers folder.

Under a fixed routing a mixture of ranks is an ordinary LoRA, and folded into the weights it is no adapter at all.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from morsr.adapters import merged
from morsr.errors import ConfigError
from morsr.imaging.files import read_planes
from morsr.models.generator import OneStepGenerator
from morsr.models.saving import write_description


def fix_routing(generator: OneStepGenerator, *, image: Any = None, strength: float = 1.0) -> dict[str, float]:
    """Set the one routing that is to be exported, that of an image.

    Args:
        generator: its adapters keep the routing.
        image: what `read_planes` takes; scored by the model's own estimator.
        strength: factor on the gates of the routed ranks.

    Returns:
        The scores by name; empty where nothing is routed.

    Raises:
        ConfigError: a routed model without an image, or another with one.
    """
    adapters = generator.adapters
    if adapters is None or not adapters.is_routed:
        if image is not None or strength != 1.0:
            raise ConfigError("this model routes nothing: image and strength have no effect")
        return {}
    if image is None:
        raise ConfigError("image: expected the one whose routing is exported")
    adapters.strength = strength
    estimated = generator.route(read_planes(image)[:1].to(generator.device))
    assert estimated is not None
    return dict(zip(estimated.names, estimated.scores[0].tolist(), strict=True))


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
