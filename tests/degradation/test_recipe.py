"""Recipes: presets, files, checks, and what is drawn from them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from morsr.degradation import DegradationParameters, DegradationRecipe, preset_names, sample_keys
from morsr.degradation.stages import BlurRecipe, NoiseRecipe, ResizeRecipe
from morsr.errors import ConfigError, InputError
from morsr.functional.kernels import KERNEL_KINDS, NONE, SINC

DRAWS = 40_000


@pytest.fixture(scope="module")
def draws() -> DegradationParameters:
    return DegradationRecipe.from_preset("realesrgan").sample(sample_keys(1, 0, torch.arange(DRAWS)))


def test_presets_are_the_published_ones() -> None:
    assert set(preset_names()) == {
        "broad", "camera", "heavy", "light", "mixed", "mixed_quarter", "pisasr", "realesrgan", "s3diff", "thumbnail",
    }  # fmt: skip
    realesrgan, pisasr, s3diff = (DegradationRecipe.from_preset(name) for name in ("realesrgan", "pisasr", "s3diff"))
    assert realesrgan == DegradationRecipe()
    assert realesrgan.second.noise.poisson_scale == (0.05, 2.5)
    assert realesrgan.second.jpeg == (30, 95)
    assert realesrgan.second.blur.probability == 0.8
    assert realesrgan.second.resize.range == (0.3, 1.2)
    assert pisasr.first.resize.range == s3diff.first.resize.range == (0.3, 1.5)
    assert pisasr.second.jpeg == s3diff.second.jpeg == (60, 100)
    assert pisasr.second.noise.sigma == (1, 12)
    assert pisasr.first.blur.sigma == (0.2, 3.0)
    assert s3diff.first.blur.sigma == (0.2, 1.5)
    assert s3diff.second.blur == BlurRecipe(
        probability=0.5, sigma=(0.2, 1.0), beta_generalized=(0.5, 2.0), beta_plateau=(1.0, 1.5)
    )


def test_hash_names_the_settings_and_not_the_name() -> None:
    recipes = [DegradationRecipe.from_preset(name) for name in preset_names()]
    assert len({recipe.hash for recipe in recipes}) == len(recipes)
    values = recipes[0].to_dict()
    assert DegradationRecipe.from_dict({**values, "name": "other"}).hash == recipes[0].hash
    assert DegradationRecipe.from_dict({**values, "sharpen": True}).hash != recipes[0].hash


def test_yaml_round_trip(tmp_path: Path) -> None:
    import yaml

    recipe = DegradationRecipe(name="mine", second=DegradationRecipe.from_preset("s3diff").second, engine="basicsr")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert DegradationRecipe.from_yaml(path) == recipe == DegradationRecipe.load(str(path))
    path.write_text("first: {jpeg: [50, 60]}")
    partial = DegradationRecipe.from_yaml(path)
    assert partial.first.jpeg == (50, 60)
    assert partial.second == DegradationRecipe().second
    assert partial.name == "mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("first: {jpeg: [95, 30]}", "95"),
        ("first: {jpeg: [0, 30]}", "1 <="),
        ("first: {jpeg: 50}", "two numbers"),
        ("first: {resize: {up: 0.5, down: 0.7, keep: 0.1}}", "sum to 1"),
        ("first: {resize: {range: [1.1, 1.5]}}", "holds 1"),
        ("first: {blur: {kinds: [0.5, 0.5]}}", "6 probabilities"),
        ("first: {blur: {kinds: [0.5, 0.1, 0.1, 0.1, 0.1, 0.2]}}", "sum to 1"),
        ("first: {blur: {sizes: [7, 20]}}", "odd"),
        ("first: {blur: {sigma: [3.0, 0.2]}}", "first.blur.sigma: expected 0.05"),
        ("second: {jpeg: [95, 30]}", "second.jpeg"),
        ("second: {resize: {up: 0.5}}", "second.resize up + down + keep"),
        ("jpeg_last_probability: 2", ": jpeg_last_probability"),
        ("first: {blur: {sigma: [.nan, 1]}}", "blur.sigma"),
        ("first: {noise: {gray_probability: 1.2}}", "from 0 to 1"),
        ("first: {noise: {sigmas: [1, 2]}}", "first.noise: unknown key sigmas"),
        ("jpg: 3", "unknown key jpg"),
        ("engine: opencv", "torch, basicsr"),
        ("sharpen: maybe", "true or false"),
        ("first: 3", "mapping"),
        ("- 1", "mapping"),
        ("mixed_with: light", "both"),
        ("mixed_share: 0.5", "both"),
        ("{mixed_with: light, mixed_share: 1.5}", "from 0 to 1"),
        ("{mixed_with: [light, camera], mixed_share: 0.5}", "as many of each"),
        ("{mixed_with: [light, camera], mixed_share: [0.5]}", "as many of each"),
        ("{mixed_with: [light, camera], mixed_share: [0.7, 0.5]}", "at most 1 together"),
        ("{mixed_with: [light, null], mixed_share: [0.5, 0]}", "mapping"),
        ("{mixed_with: [light, camera], mixed_share: [0.5, 0]}", "as many of each"),
        ("{mixed_with: [light, lite], mixed_share: [0.5, 0.1]}", "camera, heavy, light"),
        ("{mixed_with: lite, mixed_share: 0.5}", "camera, heavy, light"),
        ("{mixed_with: {first: {jpg: 3}}, mixed_share: 0.5}", "mixed_with.first: unknown key jpg"),
        ("{mixed_with: {mixed_with: light, mixed_share: 0.5}, mixed_share: 0.5}", "a mix"),
        ("first: {jpeg: [1", "not valid YAML"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"wrong\.yaml") as caught:
        DegradationRecipe.from_yaml(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("others", ["a.yaml", "[light, a.yaml]", "b.yaml"])
def test_a_recipe_that_names_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: str) -> None:
    monkeypatch.chdir(tmp_path)
    shares = "[0.1, 0.1]" if "light" in others else "0.1"
    Path("a.yaml").write_text(f"{{mixed_with: {others}, mixed_share: {shares}}}")
    Path("b.yaml").write_text("{mixed_with: ./a.yaml, mixed_share: 0.1}")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"expected plain recipes, got a mix \(.*[ab]\.yaml\)"):
            DegradationRecipe.load("a.yaml")


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="realesrgan"):
        DegradationRecipe.load("real-esrgan")
    with pytest.raises(ConfigError, match="cannot be read"):
        DegradationRecipe.load(tmp_path / "none.yaml")


def _share(mask: torch.Tensor, expected: float) -> None:
    spread = 5 * math.sqrt(max(expected * (1 - expected), 1e-4) / mask.numel())
    assert abs(mask.double().mean().item() - expected) < spread


def test_shares_are_those_of_the_recipe(draws: DegradationParameters) -> None:
    first, second, final = draws.first, draws.second, draws.final
    for place, chance in enumerate(BlurRecipe().kinds):
        _share(first.blur.kind == place, 0.9 * chance)
        _share(second.blur.kind == place, 0.8 * 0.9 * chance)
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
    generalized = (first.blur.kind == 2) | (first.blur.kind == 3)
    _share(first.blur.beta[generalized] < 1, 0.5)
    plateau = (first.blur.kind == 4) | (first.blur.kind == 5)
    _share(first.blur.beta[plateau] == 1, 0.5)


def test_ranges_are_kept_and_filled(draws: DegradationParameters) -> None:
    gaussian = draws.second.noise_kind == 0
    small = draws.first.blur.size < 13
    for value, low, high in (
        (draws.first.blur.sigma_x, 0.2, 3.0),
        (draws.second.blur.sigma_y, 0.2, 1.5),
        (draws.first.blur.rotation, -math.pi, math.pi),
        (draws.first.resize_scale, 0.15, 1.5),
        (draws.second.resize_scale, 0.3, 1.2),
        (draws.second.noise_level[gaussian], 1, 25),
        (draws.second.noise_level[~gaussian], 0.05, 2.5),
        (draws.first.jpeg_quality, 30, 95),
        (draws.first.blur.cutoff[small], math.pi / 3, math.pi),
        (draws.first.blur.cutoff[~small], math.pi / 5, math.pi),
        (draws.final.blur.cutoff, math.pi / 3, math.pi),
    ):
        margin = 0.002 * (high - low)
        assert low - 1e-6 <= value.min() < low + margin
        assert high - margin < value.max() <= high + 1e-6


def test_one_set_of_parameters_depends_on_its_key_alone() -> None:
    recipe = DegradationRecipe()
    keys = sample_keys(3, 1, torch.arange(9))
    together = recipe.sample(keys)
    assert together[4].to_jsonl() == recipe.sample(keys[4:5]).to_jsonl()
    assert together[torch.tensor([6, 2])].to_jsonl() == recipe.sample(keys[[6, 2]]).to_jsonl()
    assert DegradationParameters.concatenate([together[:3], together[3:]]).to_jsonl() == together.to_jsonl()


def test_a_change_of_one_setting_leaves_the_other_draws() -> None:
    keys = torch.arange(64)
    plain = DegradationRecipe()
    changed = replace(
        plain, first=replace(plain.first, noise=NoiseRecipe(sigma=(0, 1)), resize=ResizeRecipe(range=(0.5, 1)))
    )
    first, second = plain.sample(keys), changed.sample(keys)
    torch.testing.assert_close(first.first.blur.sigma_x, second.first.blur.sigma_x, rtol=0, atol=0)
    assert first.second.rows() == second.second.rows()
    assert first.final.rows() == second.final.rows()


def test_a_mix_draws_every_image_from_one_of_two_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("{mixed_with: light, mixed_share: 0.3, sharpen: true}")
    mix, keys = DegradationRecipe.from_yaml(path), sample_keys(5, 0, torch.arange(4000))
    drawn = mix.sample(keys)
    heavy, light = (DegradationRecipe.from_preset(name).sample(keys) for name in ("realesrgan", "light"))
    taken = drawn.first.jpeg_quality == light.first.jpeg_quality
    _share(taken, 0.3)
    assert drawn.sharpen.all()  # the mix's own setting
    for part in ("first", "second", "final"):
        rows, sources = getattr(drawn, part).rows(), [getattr(source, part).rows() for source in (heavy, light)]
        assert rows == [sources[int(other)][place] for place, other in enumerate(taken)]
    assert mix.sample(keys[7:9]).to_jsonl() == drawn[7:9].to_jsonl()


def test_a_mix_of_three_takes_each_by_its_share(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("{mixed_with: [light, {first: {jpeg: [1, 2]}}], mixed_share: [0.3, 0.2]}")
    mix, keys = DegradationRecipe.from_yaml(path), sample_keys(5, 0, torch.arange(4000))
    quality = mix.sample(keys).first.jpeg_quality
    light = DegradationRecipe.from_preset("light").sample(keys).first.jpeg_quality
    _share(quality == light, 0.3)
    _share(quality <= 2, 0.2)
    _share(quality == DegradationRecipe().sample(keys).first.jpeg_quality, 0.5)
    assert DegradationRecipe.from_dict(mix.to_dict()) == mix
    other = replace(mix, mixed_share=(0.2, 0.3))
    assert len({mix.hash, other.hash, DegradationRecipe().hash}) == 3


def test_a_mix_is_kept_by_its_settings_and_named_by_its_hash() -> None:
    light = DegradationRecipe.from_preset("light")
    mix = DegradationRecipe(mixed_with=light, mixed_share=0.3)
    assert DegradationRecipe.from_dict(mix.to_dict()) == mix
    hashes = {mix.hash, DegradationRecipe().hash, DegradationRecipe(mixed_with=light, mixed_share=0.4).hash}
    assert len(hashes) == 3
    assert DegradationRecipe(mixed_with=replace(light, name="other"), mixed_share=0.3).hash == mix.hash
    assert "mixed_with" not in DegradationRecipe().to_dict()
    assert DegradationRecipe(mixed_with=[light], mixed_share=[0.3]) == mix  # type: ignore[arg-type]
    whole = DegradationRecipe(mixed_with=light, mixed_share=1)
    assert whole.sample(3).first.jpeg_quality.min() >= 80


def test_keys_from_a_generator() -> None:
    recipe = DegradationRecipe()
    first, second, third = (recipe.sample(5, generator=torch.Generator().manual_seed(seed)).key for seed in (1, 1, 2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(
    "keys", [0, -2, torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(0).long(), True]
)
def test_wrong_keys_are_refused(keys: Any) -> None:
    with pytest.raises(InputError, match="keys"):
        DegradationRecipe().sample(keys)


def test_keys_and_a_generator_are_refused() -> None:
    with pytest.raises(InputError, match="both"):
        DegradationRecipe().sample(torch.arange(3), generator=torch.Generator())


def test_json_lines_round_trip() -> None:
    parameters = DegradationRecipe(sharpen=True).sample(torch.arange(20) - 10)
    text = parameters.to_jsonl(extra=[{"file": f"{place}.png"} for place in range(20)])
    read = DegradationParameters.from_jsonl(text)
    assert read.rows() == parameters.rows()
    assert read.key.dtype == torch.int64
    assert read.sharpen.dtype == torch.bool
    assert read.first.noise_gray.dtype == torch.bool
    assert {row["first"]["blur"]["kind"] for row in parameters.rows()} <= set(KERNEL_KINDS)
    with pytest.raises(InputError, match="20"):
        parameters.to_jsonl(extra=[{}])


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"key": 1}'])
def test_wrong_json_lines_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="parameters"):
        DegradationParameters.from_jsonl(text)


def test_an_unknown_name_in_json_lines_is_refused() -> None:
    text = DegradationRecipe().sample(torch.arange(1)).to_jsonl()
    with pytest.raises(InputError, match="mode"):
        DegradationParameters.from_jsonl(text.replace('"resize_mode": "', '"resize_mode": "x'))


def test_indexing_out_of_range() -> None:
    parameters = DegradationRecipe().sample(3)
    assert len(parameters[-1]) == 1
    assert parameters[-1].key.item() == parameters.key[2].item()
    with pytest.raises(IndexError):
        parameters[3]
