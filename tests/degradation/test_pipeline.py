"""The whole chain: independence, replay, sizes, types, errors, and parity with the reference engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from morsr.degradation import DegradationParameters, DegradationRecipe, apply, degrade, preset_names, sample_keys
from morsr.degradation import pipeline as pipeline_module
from morsr.degradation.basicsr_compat import import_basicsr
from morsr.degradation.reference import BasicsrChain, apply_reference
from morsr.errors import ConfigError, InputError, MissingDependencyError
from morsr.functional import corrupt

RECIPE = DegradationRecipe()


def _photographs(count: int, size: int) -> Tensor:
    from skimage import data

    pixels = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255
    corners = torch.randint(0, 512 - size, (count, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.stack([pixels[:, top : top + size, left : left + size] for top, left in corners])


@pytest.fixture
def _basicsr() -> None:
    try:
        import_basicsr("data.degradations")
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_an_image_does_not_depend_on_its_batch() -> None:
    hr = _photographs(6, 96)
    parameters = RECIPE.sample(sample_keys(0, 0, torch.arange(6)))
    together = apply(hr, parameters)
    for place in range(6):
        alone = apply(hr[place : place + 1], parameters[place])
        torch.testing.assert_close(together[place : place + 1], alone, rtol=0, atol=0)
    order = torch.tensor([4, 1, 5])
    torch.testing.assert_close(apply(hr[order], parameters[order]), together[order], rtol=0, atol=0)


def test_parameters_replay_exactly_from_json_and_leave_global_generators_alone() -> None:
    hr = _photographs(4, 64)
    parameters = RECIPE.sample(4, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first = apply(hr, parameters)
    assert torch.equal(state, torch.get_rng_state())
    second = apply(hr, DegradationParameters.from_jsonl(parameters.to_jsonl()))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_keys_change_the_noise_and_seeds_repeat() -> None:
    hr = _photographs(1, 64)
    parameters = RECIPE.sample(torch.tensor([11]))
    other = dataclasses.replace(parameters, key=torch.tensor([12]))
    assert not torch.equal(apply(hr, parameters), apply(hr, other))
    seeded = [degrade(hr, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    torch.testing.assert_close(seeded[0], seeded[1], rtol=0, atol=0)
    assert not torch.equal(seeded[0], seeded[2])


@settings(max_examples=15)
@given(st.integers(16, 70), st.integers(16, 70), st.sampled_from(preset_names()), st.integers(0, 2**50), st.booleans())
def test_any_size_stays_finite_in_range_and_eight_bit(
    height: int, width: int, preset: str, key: int, sharpen: bool
) -> None:
    recipe = dataclasses.replace(DegradationRecipe.from_preset(preset), sharpen=sharpen)
    hr = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(key))
    lr = apply(hr, recipe.sample(torch.tensor([key, key + 1])))
    assert lr.shape == (2, 3, height // 4, width // 4)
    assert lr.dtype == torch.float32
    levels = lr * 255
    torch.testing.assert_close(levels, levels.round().clamp(0, 255), rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_other_scales(scale: int) -> None:
    hr = _photographs(2, 64)
    lr = degrade(hr, "light", scale=scale, generator=torch.Generator().manual_seed(0))
    assert lr.shape[-1] == 64 // scale
    plain = torch.nn.functional.interpolate(hr, size=lr.shape[-2:], mode="area")
    assert (lr - plain).abs().mean() < 0.1  # the light recipe keeps the picture


@pytest.mark.parametrize("preset", ["realesrgan", "light"])
def test_the_layout_in_memory_does_not_matter(preset: str) -> None:
    hr = _photographs(12, 64).contiguous(memory_format=torch.channels_last)
    parameters = DegradationRecipe.from_preset(preset).sample(sample_keys(0, 0, torch.arange(12)))
    assert {row["first"]["noise_kind"] for row in parameters.rows()} == {"gaussian", "poisson"}
    torch.testing.assert_close(apply(hr, parameters), apply(hr.contiguous(), parameters), rtol=0, atol=2 / 255)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["realesrgan", "light"])
def test_autocast_and_half_precision_change_nothing(dtype: torch.dtype, preset: str) -> None:
    recipe = dataclasses.replace(DegradationRecipe.from_preset(preset), sharpen=True)
    parameters = recipe.sample(torch.arange(12))
    assert set(parameters.first.noise_kind.tolist()) == {0, 1}
    hr = _photographs(12, 64)
    expected = apply(hr, parameters)
    half = hr.to(dtype)
    rounded = apply(half.float(), parameters)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(apply(hr, parameters), expected, rtol=0, atol=0)
        torch.testing.assert_close(apply(half, parameters), rounded, rtol=0, atol=0)
    # All of the work is done in float32: what is left is the rounding of the input, which moves noise draws too.
    torch.testing.assert_close(apply(half, parameters), rounded, rtol=0, atol=0)
    quiet = _quiet(parameters)
    made = apply(half, quiet)
    assert made.dtype == torch.float32
    assert bool(((made >= 0) & (made <= 1)).all())
    assert (made - apply(hr, quiet)).abs().mean() < torch.finfo(dtype).eps


@pytest.mark.usefixtures("_basicsr")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_engine_takes_half_precision_too(dtype: torch.dtype) -> None:
    hr, parameters = _photographs(3, 96).to(dtype), RECIPE.sample(torch.arange(3))
    expected = apply_reference(hr.float(), parameters)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(apply_reference(hr, parameters), expected, rtol=0, atol=0)


def test_no_gradient_is_kept_and_the_input_is_left_alone() -> None:
    hr = _photographs(1, 64)
    before = hr.clone()
    assert not apply(hr.requires_grad_(), RECIPE.sample(1)).requires_grad
    torch.testing.assert_close(hr.detach(), before, rtol=0, atol=0)


def test_both_final_orders_and_every_step_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def spied(step: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **settings: Any) -> Tensor:
            order.append(step)
            return real(*args, **settings)

        return call

    steps = {
        "filter_images": "blur",
        "resize": "resize",
        "jpeg": "jpeg",
        "add_gaussian_noise": "noise",
        "add_poisson_noise": "noise",
    }
    for name, step in steps.items():
        monkeypatch.setattr(pipeline_module, name, spied(step, getattr(pipeline_module, name)))
    parameters = RECIPE.sample(torch.arange(200))
    whole = (parameters.second.blur.kind != 7) & (parameters.final.blur.kind != 7)
    start = ["blur", "resize", "noise", "jpeg", "blur", "resize", "noise"]
    for jpeg_last, end in ((True, ["resize", "blur", "jpeg"]), (False, ["jpeg", "resize", "blur"])):
        place = int((whole & (parameters.final.jpeg_last == jpeg_last)).nonzero()[0])
        order.clear()
        apply(_photographs(1, 64), parameters[place])
        assert order == start + end


@pytest.mark.parametrize(
    ("hr", "said"),
    [
        (torch.rand(3, 64, 64), "B, C, H, W"),
        (torch.rand(2, 1, 64, 64), "3 channels"),
        (torch.rand(2, 3, 64, 64) * 2, r"\[0, 1\]"),
        (torch.full((2, 3, 64, 64), math.nan), "finite"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "floating"),
        (torch.rand(2, 3, 64, 12), "16 x 16"),
        (torch.rand(3, 3, 64, 64), "3 sets"),
    ],
)
def test_wrong_images_are_refused(hr: Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        apply(hr, RECIPE.sample(2))


@pytest.mark.parametrize("scale", [0, 2.5, True])
def test_wrong_scales_are_refused(scale: Any) -> None:
    with pytest.raises(InputError, match="scale"):
        apply(torch.rand(1, 3, 64, 64), RECIPE.sample(1), scale=scale)


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="realesrgan"):
        degrade(torch.rand(1, 3, 64, 64), "bsrgan")


# --------------------------------------------------------------------------------------------- reference engine


def _quiet(parameters: DegradationParameters) -> DegradationParameters:
    """The same parameters without noise, which no two engines can share."""
    stages = {}
    for name in ("first", "second"):
        stage = getattr(parameters, name)
        kind, level = torch.zeros_like(stage.noise_kind), torch.zeros_like(stage.noise_level)
        stages[name] = dataclasses.replace(stage, noise_kind=kind, noise_level=level)
    return dataclasses.replace(parameters, **stages)


@pytest.mark.usefixtures("_basicsr")
def test_the_noiseless_chain_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "jpeg", lambda image, quality: corrupt.jpeg(image, quality, tables="basicsr"))
    hr = _photographs(12, 128)
    parameters = _quiet(RECIPE.sample(torch.arange(12)))
    difference = (apply(hr, parameters) - apply_reference(hr, parameters)).abs() * 255
    # Rounding edges in JPEG and in the last 8 bits: nearly every pixel is equal.
    assert (difference > 0.5).double().mean() < 0.03
    assert difference.mean() < 0.05


@pytest.mark.usefixtures("_basicsr")
def test_the_reference_engine_is_chosen_by_the_recipe() -> None:
    hr = _photographs(2, 128)
    recipe = dataclasses.replace(RECIPE, engine="basicsr", sharpen=True)
    lr = degrade(hr, recipe, generator=torch.Generator().manual_seed(3))
    parameters = recipe.sample(2, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    torch.testing.assert_close(lr, apply_reference(hr, parameters), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(lr[1:], apply_reference(hr[1:], parameters[1]), rtol=0, atol=0)


@pytest.mark.usefixtures("_basicsr")
def test_the_batch_chain_of_basicsr_runs_every_branch() -> None:
    hr = _photographs(2, 128)
    for _ in range(8):
        lr = BasicsrChain(RECIPE)(hr)
        assert lr.shape == (2, 3, 32, 32)
        assert bool(((lr >= 0) & (lr <= 1)).all())
    with pytest.raises(ConfigError, match="got a mix"):
        BasicsrChain(dataclasses.replace(RECIPE, mixed_with=RECIPE, mixed_share=0.5))
