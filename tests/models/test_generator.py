"""The generator, the arithmetic of its step, and the shipped base."""

import pytest
import torch

from morsr.errors import ConfigError, InputError
from morsr.functional.diffusion import add_noise, epsilon_from_velocity
from morsr.models.bases import SHIPPED_BASES, load_base, package_weights
from morsr.models.generator import OneStepConfig, OneStepGenerator, enlarge
from morsr.models.loading import load_generator


def test_enlarging_is_opencvs_bicubic():
    import cv2
    import numpy as np

    image = np.random.default_rng(0).random((7, 9, 3), dtype=np.float32)
    ours = enlarge(torch.from_numpy(image).permute(2, 0, 1)[None], (28, 36))
    theirs = cv2.resize(image, (36, 28), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    torch.testing.assert_close(ours[0].permute(1, 2, 0), torch.from_numpy(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"timestep": 1000}, "0 to 999"),
        ({"parametrization": "x0"}, "epsilon"),
        ({"parametrization": "residual", "scale_input": True}, "scale_input"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, word):
    with pytest.raises(ConfigError, match=word):
        OneStepConfig(**settings)


def test_an_empty_output_is_refused(small_base):
    with pytest.raises(InputError, match="larger scale"):
        OneStepGenerator(load_base(small_base))(torch.rand(1, 3, 4, 4), scale=0.1)


def test_velocity_holds_the_noise():
    latents, noise = torch.randn(2, 1, 4, 2, 2)
    alpha_bar = 0.3
    velocity = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * latents
    recovered = epsilon_from_velocity(add_noise(latents, noise, alpha_bar), velocity, alpha_bar)
    torch.testing.assert_close(recovered, noise, atol=1e-5, rtol=1e-5)


def test_every_shipped_base_is_known_by_its_folder():
    root = package_weights("tiny").parent
    assert sorted(SHIPPED_BASES) == sorted(folder.parent.name for folder in root.glob("*/unet"))
    for name in SHIPPED_BASES:
        base = load_base(name)
        assert (base.source, base.base_id, base.latent_factor) == (name, f"morsr/{name}", 4)


def test_shipped_models_are_small():
    root = package_weights("tiny").parent
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) <= 12.5e6
    for folder in root.glob("*/adapters.safetensors"):
        generator = load_generator(folder.parent.name)
        assert sum(parameter.numel() for parameter in generator.parameters()) <= 6e6
