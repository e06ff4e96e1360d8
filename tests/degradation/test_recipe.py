"""Recipes: presets, files, checks, and what is drawn from them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from morsr.degradation import DegradationParameters, DegradationRecipe, preset_names, sample_keys
from morsr.degradation.stages import BlurRecipe, NoiseRecipe, SingleRecipe
from morsr.errors import ConfigError, InputError
from morsr.functional.kernels import NONE, SINC

DRAWS = 20_000


@pytest.fixture(scope="module")
def draws():
    return DegradationRecipe.load("realesrgan").sample(sample_keys(1, 0, torch.arange(DRAWS)))


class Rain(DegradationRecipe):
    """A recipe of the user's own."""

    def sample(self, keys: Tensor) -> DegradationParameters:
        drawn = super().sample(keys)
        return replace(drawn, second=replace(drawn.second, jpeg_quality=torch.full_like(drawn.second.jpeg_quality, 7)))


def test_presets_are_the_published_ones():
    realesrgan, pisasr, s3diff = (DegradationRecipe.load(name) for name in ("realesrgan", "pisasr", "s3diff"))
    assert realesrgan == DegradationRecipe()
    second = realesrgan.second
    assert (second.noise.poisson_scale, second.jpeg, second.blur.probability) == ((0.05, 2.5), (30, 95), 0.8)
    assert second.resize.range == (0.3, 1.2)
    assert pisasr.first.resize.range == s3diff.first.resize.range == (0.3, 1.5)
    assert pisasr.second.jpeg == s3diff.second.jpeg == (60, 100)
    assert (pisasr.second.noise.sigma, pisasr.first.blur.sigma) == ((1, 12), (0.2, 3.0))
    shapes = {"beta_generalized": (0.5, 2.0), "beta_plateau": (1.0, 1.5)}
    assert s3diff.second.blur == BlurRecipe(probability=0.5, sigma=(0.2, 1.0), **shapes)


def test_the_hash_tells_settings_and_not_names():
    recipes = [DegradationRecipe.load(name) for name in preset_names()]
    assert len({recipe.hash for recipe in recipes} | {Rain().hash}) == len(recipes) + 1
    assert replace(recipes[0], name="other").hash == recipes[0].hash
    assert replace(recipes[0], sharpen=True).hash != recipes[0].hash
    light = DegradationRecipe.load("light")
    mixes = [DegradationRecipe(mix={light: 0.3}), DegradationRecipe(mix={light: 0.2}), DegradationRecipe()]
    assert len({recipe.hash for recipe in mixes}) == 3


def test_a_recipe_by_file_or_class_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("{first: {jpeg: [50, 60]}, single: {share: 0.5}}")
    mine = DegradationRecipe.load(path)
    expected = replace(DegradationRecipe().first, jpeg=(50, 60))
    assert mine == DegradationRecipe(name="mine", first=expected, single=SingleRecipe(share=0.5))
    assert DegradationRecipe.load(f"{__name__}.Rain").sample(torch.arange(3)).second.jpeg_quality.tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    "text",
    [
        "first: {jpeg: [95, 30]}",
        "first: {jpeg: 50}",
        "first: {resize: {up: 0.5, down: 0.7, keep: 0.1}}",
        "first: {blur: {kinds: [0.5, 0.1, 0.1, 0.1, 0.1, 0.2]}}",
        "first: {blur: {sizes: [7, 20]}}",
        "first: {noise: {gray_probability: 1.2}}",
        "first: {noise: {sigmas: [1, 2]}}",
        "second: {resize: {up: 0.5}}",
        "jpg: 3",
        "single: {share: 2}",
        "mix: {light: 1.5}",
        "mix: {light: 0.7, camera: 0.5}",
        "mix: {mixed: 0.5}",
        "mix: {./wrong.yaml: 0.1}",
        "first: {jpeg: [1",
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text):
    Path("wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"wrong\.yaml") as caught:
        DegradationRecipe.load("wrong.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["real-esrgan", "none.yaml", "nowhere.Rain", "torch.Tensor", "math.pi"])
def test_what_is_no_recipe_is_refused(recipe):
    with pytest.raises(ConfigError):
        DegradationRecipe.load(recipe)


def _share(mask: Tensor, expected: float) -> None:
    spread = 5 * math.sqrt(max(expected * (1 - expected), 1e-4) / mask.numel())
    assert abs(mask.double().mean().item() - expected) < spread


def test_shares_are_those_of_the_recipe(draws):
    first, second, final = draws.first, draws.second, draws.final
    for place, chance in enumerate(BlurRecipe().kinds):
        _share(first.blur.kind == place, 0.9 * chance)
    _share(first.blur.kind == SINC, 0.1)
    _share(second.blur.kind == NONE, 0.2)
    _share(final.blur.kind == SINC, 0.8)
    for side in range(7, 22, 2):
        _share(first.blur.size == side, 1 / 8)
    for stage, (up, down, keep) in ((first, (0.2, 0.7, 0.1)), (second, (0.3, 0.4, 0.3))):
        _share(stage.resize_scale > 1, up)
        _share(stage.resize_scale < 1, down)
        _share(stage.resize_scale == 1, keep)
        _share(stage.noise_kind == 1, 0.5)
        _share(stage.noise_gray, 0.4)
        for mode in range(3):
            _share(stage.resize_mode == mode, 1 / 3)
    _share(final.jpeg_last, 0.5)
    seldom = DegradationRecipe(jpeg_last_probability=0.2).sample(sample_keys(1, 0, torch.arange(DRAWS)))
    _share(seldom.final.jpeg_last, 0.2)
    generalized = (first.blur.kind == 2) | (first.blur.kind == 3)
    _share(first.blur.beta[generalized] < 1, 0.5)
    plateau = (first.blur.kind == 4) | (first.blur.kind == 5)
    _share(first.blur.beta[plateau] == 1, 0.5)


def test_ranges_are_kept_and_filled(draws):
    gaussian, small = draws.second.noise_kind == 0, draws.first.blur.size < 13
    beta = draws.first.blur.beta[draws.first.blur.kind < 4]
    for value, low, high in (
        (draws.first.blur.sigma_x, 0.2, 3.0),
        (draws.second.blur.sigma_y, 0.2, 1.5),
        (draws.first.blur.rotation, -math.pi, math.pi),
        (beta[beta < 1], 0.5, 1),
        (beta[beta > 1], 1, 4),
        (draws.first.resize_scale, 0.15, 1.5),
        (draws.second.resize_scale, 0.3, 1.2),
        (draws.second.noise_level[gaussian], 1, 25),
        (draws.second.noise_level[~gaussian], 0.05, 2.5),
        (draws.first.jpeg_quality, 30, 95),
        (draws.first.blur.cutoff[small], math.pi / 3, math.pi),
        (draws.first.blur.cutoff[~small], math.pi / 5, math.pi),
        (draws.final.blur.cutoff, math.pi / 3, math.pi),
    ):
        margin = 0.003 * (high - low)
        assert low - 1e-6 <= value.min() < low + margin
        assert high - margin < value.max() <= high + 1e-6


def _columns(parameters: DegradationParameters) -> dict[str, np.ndarray]:
    """All drawn numbers by name; those whose range depends on the kernel's kind or size by their place in it."""
    found: dict[str, np.ndarray] = {}
    for group_name in ("first", "second", "final"):
        group = getattr(parameters, group_name)
        for name, value in {**vars(group), **vars(group.blur)}.items():
            if name != "blur":
                found[f"{group_name}.{name}"] = value.double().numpy()
        lowest = np.where((group.blur.size < 13) | (group_name == "final"), math.pi / 3, math.pi / 5)
        found[f"{group_name}.cutoff"] = (found[f"{group_name}.cutoff"] - lowest) / (math.pi - lowest)
        found[f"{group_name}.beta"] = (group.blur.beta <= 1).double().numpy()  # the lower half of the draws
    return found


@pytest.mark.parametrize("recipe", [DegradationRecipe(), DegradationRecipe(name="only", first=replace(
    DegradationRecipe().first, noise=NoiseRecipe(gaussian_probability=1.0)))])  # fmt: skip
def test_no_two_drawn_numbers_are_correlated(recipe):
    """sigma_y from sigma_x's number, say, would make every anisotropic kernel isotropic, and keep every range."""
    columns = _columns(recipe.sample(sample_keys(4, 0, torch.arange(DRAWS))))
    # Levels of Gaussian and Poisson noise have ranges of their own, so the level goes with the kind.
    columns = {name: values for name, values in columns.items() if "noise_kind" not in name and values.std() > 0}
    correlation = np.corrcoef(np.stack(list(columns.values()))) - np.eye(len(columns))
    worst = np.unravel_index(np.abs(correlation).argmax(), correlation.shape)
    assert abs(correlation[worst]) < 5 / math.sqrt(DRAWS), [list(columns)[place] for place in worst]


def test_one_set_of_parameters_depends_on_its_key_alone():
    recipe = DegradationRecipe.load("mixed_single")
    keys = sample_keys(3, 1, torch.arange(9))
    together = recipe.sample(keys)
    assert together[4].rows() == recipe.sample(keys[4:5]).rows() == together[-5].rows()
    assert together[torch.tensor([6, 2])].rows() == recipe.sample(keys[[6, 2]]).rows()
    assert DegradationParameters.concatenate([together[:3], together[3:]]).rows() == together.rows()


def test_a_mix_draws_every_image_from_one_of_its_recipes(tmp_path):
    path = tmp_path / "mix.yaml"
    (tmp_path / "other.yaml").write_text("first: {jpeg: [1, 2]}")
    path.write_text(f"{{mix: {{light: 0.3, {tmp_path}/other.yaml: 0.2}}, sharpen: true}}")
    keys = sample_keys(5, 0, torch.arange(3000))
    drawn = DegradationRecipe.load(path).sample(keys)
    heavy, light = (DegradationRecipe.load(name).sample(keys) for name in ("realesrgan", "light"))
    taken = drawn.first.jpeg_quality == light.first.jpeg_quality
    _share(taken, 0.3)
    _share(drawn.first.jpeg_quality <= 2, 0.2)
    _share(drawn.first.jpeg_quality == heavy.first.jpeg_quality, 0.5)
    assert drawn.sharpen.all()  # the mix's own setting
    for part in ("first", "second", "final"):
        assert getattr(drawn[taken], part).rows() == getattr(light[taken], part).rows()


def test_a_quarter_is_degraded_in_one_way_at_uniform_strength():
    keys = sample_keys(5, 0, torch.arange(DRAWS))
    drawn, plain = (DegradationRecipe.load(name).sample(keys) for name in ("mixed_single", "mixed"))
    single = drawn.first.jpeg_quality > 100
    _share(single, 0.25)
    assert drawn[~single].rows() == plain[~single].rows()
    part, ranges = drawn[single], SingleRecipe()
    ways = {
        "blur": (part.final.blur.kind == 0, part.final.blur.sigma_x),
        "noise": (part.second.noise_level > 0, part.second.noise_level),
        "jpeg": (part.second.jpeg_quality <= 100, part.second.jpeg_quality),
    }
    assert (sum(mask.int() for mask, _ in ways.values()) == 1).all()
    for name, (mask, strength) in ways.items():
        _share(mask, 1 / 3)
        low, high = getattr(ranges, name)
        uniform = (strength[mask] - low) / (high - low)
        for edge in (0.1, 0.5, 0.9):
            _share(uniform < edge, edge)


@pytest.mark.parametrize("keys", [torch.zeros(3), torch.zeros(2, 2).long(), torch.zeros(0).long()])
def test_wrong_keys_are_refused(keys):
    with pytest.raises(InputError):
        DegradationRecipe().sample(keys)


class Plain:
    """Not even a subclass."""

    def sample(self, keys: Tensor) -> DegradationParameters:
        return DegradationRecipe.load("light").sample(keys)


def test_any_class_with_sample_is_a_recipe_alone_and_in_a_mix():
    keys = torch.arange(50)
    qualities = DegradationRecipe(mix={f"{__name__}.Plain": 1.0}).sample(keys).second.jpeg_quality
    assert torch.equal(qualities, Plain().sample(keys).second.jpeg_quality)
