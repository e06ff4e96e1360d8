"""A small base of Stable Diffusion's classes, and files in the layouts that OSEDiff and PiSA-SR publish.

The files are made by peft itself: its adapters on a network give the keys and shapes, so nothing here repeats what the
importer believes of them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from twins import on_base, save, write_twin

from morsr.adapters import adapter_parameters
from morsr.models.bases import load_base
from morsr.models.generator import OneStepGenerator
from morsr.restoring import Restorer


@pytest.fixture(scope="session")
def kl_base(tmp_path_factory):
    """A diffusers folder with a small UNet and AutoencoderKL; its text embeddings are cached for the prompt ""."""
    folder = tmp_path_factory.mktemp("bases")
    base = load_base(write_twin(folder / "sd15", "sd15"))
    base.prompt, base.base_id = "", "morsr/kl"
    base.save(folder / "kl")
    return folder / "kl"


@pytest.fixture
def generator(small_base):
    """A generator over the small base whose ranks change the output of UNet and encoder, by routes that differ."""
    generator = on_base(small_base, targets=("sd_unet@unet", "tiny_vae_encoder@vae"))
    torch.manual_seed(1)
    torch.nn.init.normal_(generator.adapters.router.weight, std=2.0)
    for parameter in adapter_parameters(generator.base):
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return generator


@pytest.fixture
def adapters_file(generator, tmp_path):
    """Its adapters as training saves them."""
    return save(tmp_path / "adapters.safetensors", generator)


@pytest.fixture
def lr():
    """An image whose enlargement fits no grid."""
    return torch.rand(1, 3, 9, 13)


@pytest.fixture
def photo(tmp_path, lr):
    """That image as a file."""
    path = tmp_path / "photo.png"
    Image.fromarray((lr[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(path)
    return path


@pytest.fixture
def pixels():
    """Reads a file as (1, 3, h, w) in [0, 1]."""
    return lambda path: torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1)[None] / 255


@pytest.fixture
def restored(pixels):
    """Restores a file with a generator, as a whole and with no change of colours."""

    def restore(model: OneStepGenerator, path: Path, **settings: float) -> torch.Tensor:
        return Restorer(model, device="cpu")(pixels(path), color="none", tile=None, **settings)

    return restore
