"""The whole chain: independence, replay, sizes, types, errors, and parity with basicsr's operators."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morsr.degradation import DegradationParameters, DegradationRecipe, apply, preset_names, sample_keys
from morsr.degradation import pipeline as pipeline_module
from morsr.errors import InputError

RECIPE = DegradationRecipe()


def _photographs(count: int, size: int) -> Tensor:
    from skimage import data

    pixels = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255
    corners = torch.randint(0, 512 - size, (count, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.stack([pixels[:, top : top + size, left : left + size] for top, left in corners])


def _quiet(parameters: DegradationParameters) -> DegradationParameters:
    """The same parameters without noise."""
    stages = {}
    for name in ("first", "second"):
        stage = getattr(parameters, name)
        stages[name] = dataclasses.replace(stage, noise_level=torch.zeros_like(stage.noise_level))
    return dataclasses.replace(parameters, **stages)


def test_an_image_does_not_depend_on_its_batch():
    hr = _photographs(6, 96)
    parameters = RECIPE.sample(sample_keys(0, 0, torch.arange(6)))
    together = apply(hr, parameters)
    for place in range(6):
        alone = apply(hr[place : place + 1], parameters[place])
        torch.testing.assert_close(together[place : place + 1], alone, rtol=0, atol=0)
    order = torch.tensor([4, 1, 5])
    torch.testing.assert_close(apply(hr[order], parameters[order]), together[order], rtol=0, atol=0)


def test_replay_by_key_is_exact_and_leaves_the_global_generator_and_the_input_alone():
    hr = _photographs(4, 64)
    before, state = hr.clone(), torch.get_rng_state()
    recipe = dataclasses.replace(RECIPE, sharpen=True, single=dataclasses.replace(RECIPE.single, share=0.3))
    parameters = recipe.sample(sample_keys(1, 0, torch.arange(4)))
    read = recipe.sample(torch.tensor([row["key"] for row in json.loads(json.dumps(parameters.rows()))]))
    assert read.rows() == parameters.rows()
    first, second = apply(hr.requires_grad_(), parameters), apply(hr, read)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(hr.detach(), before, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert not first.requires_grad


@settings(max_examples=15)
@given(st.integers(16, 70), st.integers(16, 70), st.sampled_from(preset_names()), st.integers(0, 2**50), st.booleans())
def test_any_size_stays_finite_in_range_and_eight_bit(height, width, preset, key, sharpen):
    recipe = dataclasses.replace(DegradationRecipe.load(preset), sharpen=sharpen)
    hr = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(key))
    lr = apply(hr, recipe.sample(torch.tensor([key, key + 1])))
    assert lr.shape == (2, 3, height // 4, width // 4)
    assert lr.dtype == torch.float32
    levels = lr * 255
    torch.testing.assert_close(levels, levels.round().clamp(0, 255), rtol=0, atol=1e-4)


def test_autocast_half_precision_and_memory_layout_change_nothing():
    parameters = dataclasses.replace(RECIPE, sharpen=True).sample(torch.arange(12))
    assert set(parameters.first.noise_kind.tolist()) == {0, 1}
    hr = _photographs(12, 64).bfloat16()
    expected = apply(hr.float(), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(apply(hr, parameters), expected, rtol=0, atol=0)
    other = hr.float().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(apply(other, parameters), expected, rtol=0, atol=2 / 255)


def test_the_noiseless_chain_equals_basicsrs(monkeypatch):
    import oracle

    monkeypatch.setattr(pipeline_module, "jpeg", oracle.diff_jpeg)
    hr = _photographs(8, 96)
    parameters = _quiet(dataclasses.replace(RECIPE, sharpen=True).sample(torch.arange(8)))
    difference = (apply(hr, parameters) - oracle.apply(hr, parameters)).abs() * 255
    # Rounding edges in JPEG and in the last 8 bits: nearly every pixel is equal.
    assert (difference > 0.5).double().mean() < 0.03
    assert difference.mean() < 0.05


@pytest.mark.parametrize(
    ("hr", "settings"),
    [
        (torch.rand(3, 64, 64), {}),
        (torch.rand(2, 1, 64, 64), {}),
        (torch.full((2, 3, 64, 64), math.nan), {}),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), {}),
        (torch.rand(2, 3, 64, 12), {}),
        (torch.rand(3, 3, 64, 64), {}),
        (torch.rand(2, 3, 64, 64), {"scale": 0}),
        (torch.rand(2, 3, 64, 64), {"scale": 2.5}),
    ],
)
def test_wrong_images_and_scales_are_refused(hr, settings):
    with pytest.raises(InputError):
        apply(hr, RECIPE.sample(torch.arange(2)), **settings)
