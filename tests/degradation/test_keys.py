"""Keyed random numbers: golden values, and independence of batch mates."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from morsr.degradation.keys import STEP, mix, sample_keys, uniforms


def test_mix_is_splitmix64():
    # The first three outputs of the published generator started at 0; its state is the step times 1, 2, 3.
    states = torch.arange(1, 4, dtype=torch.int64) * STEP
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value & (2**64 - 1) for value in mix(states).tolist()] == expected


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8))
def test_a_draw_depends_on_its_own_key_alone(keys):
    together = uniforms(torch.tensor(keys), 7)
    assert bool(((together >= 0) & (together < 1)).all())
    for place, key in enumerate(keys):
        torch.testing.assert_close(together[place], uniforms(torch.tensor([key]), 7)[0], rtol=0, atol=0)


def test_draws_are_uniform_and_uncorrelated():
    draws = uniforms(torch.arange(20_000), 8).numpy()
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(draws.T)
    assert np.abs(correlation - np.eye(8)).max() < 0.04
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.04  # neighbouring keys


def test_sample_keys_differ_in_every_argument():
    index = torch.arange(500)
    keys = torch.cat([sample_keys(seed, epoch, index) for seed in (0, 1, -3) for epoch in (0, 1)])
    assert keys.unique().numel() == keys.numel()
    torch.testing.assert_close(sample_keys(5, 2, index)[7:9], sample_keys(5, 2, torch.tensor([7, 8])), rtol=0, atol=0)
