from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from morsr import MoRPipeline, Restorer
from morsr.adapters import MoRConfig
from morsr.errors import ConfigError
from morsr.estimators import build_estimator
from morsr.models.backbone import load_backbone
from morsr.models.generator import OneStepConfig, OneStepGenerator


@pytest.fixture
def generator(small_base: Path) -> OneStepGenerator:
    adapters = MoRConfig(num_ranks=4, num_shared=1, top_k=1, num_zero=1, targets=("sd_unet@unet",))
    return OneStepGenerator(
        load_backbone(small_base), build_estimator("frequency"), adapters=adapters, one_step=OneStepConfig(timestep=150)
    )


def test_it_is_a_diffusers_pipeline_over_the_same_networks(generator: OneStepGenerator) -> None:
    pipeline = MoRPipeline(generator)
    assert isinstance(pipeline, DiffusionPipeline)
    assert set(pipeline.components) == {"generator"}
    assert pipeline.unet is generator.backbone.unet
    assert pipeline.vae is generator.backbone.vae
    pipeline.to(torch.float64)
    assert generator.backbone.unet.conv_in.weight.dtype == torch.float64


def test_it_gives_what_the_restorer_gives(generator: OneStepGenerator) -> None:
    image = torch.rand(1, 3, 8, 8)
    expected = Restorer(generator, device="cpu")(image)
    torch.testing.assert_close(MoRPipeline(generator)(image, output_type="pt").images, expected, atol=0, rtol=0)


def test_output_types(generator: OneStepGenerator) -> None:
    pipeline = MoRPipeline(generator)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8))
    (restored,) = pipeline(picture, scale=2.0).images
    assert restored.size == (20, 16)
    (array,) = pipeline(picture, output_type="np", return_dict=False)[0]
    assert array.shape == (32, 40, 3)
    with pytest.raises(ConfigError, match="latent"):
        pipeline(picture, output_type="latent")
    assert len(pipeline([picture, picture], routing="sequence").images) == 2
    with pytest.raises(ConfigError, match="list of frames"):
        pipeline(picture, routing="sequence")
