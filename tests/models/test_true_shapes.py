"""Stable Diffusion 2.1's true shapes, on the meta device: no weights, no arithmetic."""

import pytest
import torch

from morsr.adapters import MoRConfig, adapter_parameters, inject
from morsr.models.bases import Base, load_base


def build() -> Base:
    with torch.device("meta"):
        return load_base("random:sd21", decoder="random:taesd").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> Base:
    """For tests that leave it as it is."""
    return build()


def test_it_has_the_published_sizes(base: Base) -> None:
    sizes = {name: sum(p.numel() for p in getattr(base, name).parameters()) for name in ("unet", "vae")}
    assert sizes == {"unet": 865_910_724, "vae": 83_653_863}
    assert sum(p.numel() for p in base.decoder.decoder.parameters()) == 1_222_531
    assert (base.latent_factor, base.multiple, base.scaling_factor) == (8, 64, 0.18215)
    assert base.prompt_clean.shape == (1, 77, 1024)


def test_an_image_goes_through_at_full_size(base: Base) -> None:
    images = torch.empty(2, 3, 512, 512, device="meta")
    with torch.no_grad():
        latents = base.encode(images)
        assert latents.shape == (2, 4, 64, 64)
        noise = base.predict(latents, torch.empty(2, dtype=torch.int64, device="meta"))
        assert noise.shape == latents.shape
        assert noise.dtype == torch.float32
        assert base.decode(latents).shape == images.shape
        kept, base.decoder = base.decoder, None
        try:
            assert base.decode(latents).shape == images.shape
        finally:
            base.decoder = kept


def test_the_papers_adapters_have_44_million_parameters() -> None:
    base = build()
    report = inject(base, MoRConfig(targets=("sd_unet@unet", "sd_vae_encoder@vae")), condition_dim=7)
    assert len(report.layer_names) == 258 + 31 + 1
    # 1.0139 M + 0.0923 M per rank, 40 ranks, and a router of 290 layers x 36 slots x (7 + 1)
    assert sum(p.numel() for p in adapter_parameters(base)) == 44_334_200
    inject(base, MoRConfig.of_kind("lora", num_ranks=4, targets=("sd_unet@unet",)), name="score")
    assert sum(p.numel() for p in adapter_parameters(base, "score")) == 4_055_712
