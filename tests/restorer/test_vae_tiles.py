"""An autoencoder in tiles gives what it gives as a whole: group statistics and attention included."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from morsr.models.backbone import Backbone, build_backbone
from morsr.models.restorer import Restorer
from morsr.models.vae_tiles import tile_cores, vae_tiles

UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8, "cross_attention_dim": 8, "norm_num_groups": 4,
}  # fmt: skip
VAES = {
    "kl": {
        "block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    "tiny": {
        "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "latent_channels": 4,
        "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1),
    },
}  # fmt: skip


def make(kind: str) -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(UNET, VAES[kind]).eval()
    for module in backbone.vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.3)
            torch.nn.init.normal_(module.bias, std=0.3)
    return backbone


def psnr(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(-10 * ((ours - wanted).square().mean() / wanted.abs().max().square()).log10())


@pytest.mark.parametrize("kind", VAES)
@torch.no_grad()
def test_tiles_give_the_whole(kind: str):
    backbone = make(kind)
    images = torch.rand(2, 3, 112, 208) * torch.linspace(0, 1, 208) * 2 - 1  # dark on the left: tiles differ
    latents = backbone.encode(images)
    decoded = backbone.decode(latents)
    with vae_tiles(backbone.vae, backbone.latent_factor, 12):
        tiled_latents = backbone.encode(images)
        tiled = backbone.decode(latents)
    assert psnr(tiled_latents, latents) > 70
    assert psnr(tiled, decoded) > 70
    assert_close(backbone.decode(latents), decoded, atol=0, rtol=0)


@torch.no_grad()
def test_statistics_of_single_tiles_would_be_others(monkeypatch: pytest.MonkeyPatch):
    """What the sharing is for: the same tiles, each with its own statistics, are far off."""
    backbone = make("kl")
    latents = torch.randn(1, 4, 28, 52) * torch.linspace(0, 2, 52)
    decoded = backbone.decode(latents)
    monkeypatch.setattr("morsr.models.vae_tiles._Lockstep.run", lambda self, tiled, cut, finish: [
        finish(core, tiled(cut(core))) for core in self.cores
    ])  # fmt: skip
    with vae_tiles(backbone.vae, backbone.latent_factor, 12):
        assert psnr(backbone.decode(latents), decoded) < 40


@torch.no_grad()
def test_an_error_in_one_tile_ends_them_all(monkeypatch: pytest.MonkeyPatch):
    import threading

    backbone = make("kl")
    before = set(threading.enumerate())
    convolution = backbone.vae.decoder.conv_out

    def full(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch, vae_tiles(backbone.vae, backbone.latent_factor, 12):
        patch.setattr(convolution, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            backbone.decode(torch.randn(1, 4, 28, 28))
    assert not set(threading.enumerate()) - before
    assert torch.isfinite(backbone.decode(torch.randn(1, 4, 28, 28))).all()


def test_memory_that_runs_out_tiles_the_autoencoder_first(restorer: Restorer, monkeypatch: pytest.MonkeyPatch):
    images = torch.rand(1, 3, 96, 96)
    whole = restorer(images, tile=None)
    decoder = restorer.generator.backbone.vae.decoder
    sides: list[int] = []
    convolve = decoder.layers[0].forward

    def small_only(latents: torch.Tensor) -> torch.Tensor:
        sides.append(max(latents.shape[-2:]))
        if sides[-1] > 90:
            raise torch.OutOfMemoryError("out of memory")
        return convolve(latents)

    monkeypatch.setattr(decoder.layers[0], "forward", small_only)
    with pytest.warns(UserWarning, match="autoencoder in tiles of 192"):
        tiled = restorer(images, tile=None)
    assert sides[0] == 96
    assert psnr(tiled, whole) > 70


def test_cores_cover_the_image_once():
    counts = torch.zeros(29, 50)
    for core, seen in tile_cores(29, 50, 12, 5):
        counts[core.rows, core.columns] += 1
        assert seen.top <= core.top
        assert seen.left + seen.width <= 50
    assert_close(counts, torch.ones(29, 50))
