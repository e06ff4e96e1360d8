"""A small decoder whose last upsampling is one convolution: images, gradients, keys as with diffusers' own layers."""

import copy

import pytest
import torch
from diffusers import AutoencoderTiny

from morsr import MoRConfig, inject
from morsr.models.bases.decoder import PhaseDecoder, with_phases


def small(blocks=(1, 1, 0)):
    """An AutoencoderTiny of random weights; its parts are read by their keys only."""
    torch.manual_seed(0)
    width = [8] * len(blocks)
    return AutoencoderTiny(
        latent_channels=4, encoder_block_out_channels=width, decoder_block_out_channels=width,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("size", [(2, 2), (3, 5), (8, 8)])
def test_same_image_and_gradients(size):
    plain = small()
    phases = with_phases(copy.deepcopy(plain))
    assert isinstance(phases.decoder.layers, PhaseDecoder)
    assert list(phases.state_dict()) == list(plain.state_dict())
    z, wanted = torch.randn(2, 4, *size), torch.randn(2, 3, 4 * size[0], 4 * size[1])
    for vae in (plain, phases):
        (vae.decoder(z) * wanted).sum().backward()
    torch.testing.assert_close(phases.decoder(z), plain.decoder(z), atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(phases.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_ranks_on_its_convolutions_count():
    vae = with_phases(small())
    inject(vae, MoRConfig(num_ranks=2, num_shared=2, top_k=0, num_zero=0, targets=[r"decoder\.layers\.\d+"]))
    with torch.no_grad():
        vae.decoder.layers[-2].sets["generator"].lora_B.fill_(0.1)
    layers, hidden = vae.decoder.layers, torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(layers(hidden), torch.nn.Sequential.forward(layers, hidden))


def test_a_block_after_the_upsampling_keeps_the_layers():
    assert not isinstance(with_phases(small((1, 1, 1))).decoder.layers, PhaseDecoder)
