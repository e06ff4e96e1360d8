"""Keyed random numbers: golden values, and keys that differ."""

import torch

from morsr.degradation.keys import STEP, mix, sample_keys


def test_mix_is_splitmix64():
    # The first three outputs of the published generator started at 0; its state is the step times 1, 2, 3.
    states = torch.arange(1, 4, dtype=torch.int64) * STEP
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value & (2**64 - 1) for value in mix(states).tolist()] == expected


def test_sample_keys_differ_in_every_argument():
    index = torch.arange(500)
    keys = torch.cat([sample_keys(seed, epoch, index) for seed in (0, 1, -3) for epoch in (0, 1)])
    assert keys.unique().numel() == keys.numel()
    torch.testing.assert_close(sample_keys(5, 2, index)[7:9], sample_keys(5, 2, torch.tensor([7, 8])), rtol=0, atol=0)
