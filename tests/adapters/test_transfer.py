"""A set that starts from a plain LoRA computes what the LoRA computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from morsr.adapters import MoRConfig, inject, load_adapters, routing_context, save_adapters, start_from_adapters
from morsr.errors import WeightsError


@pytest.fixture
def lora(tmp_path: Path, toy: Any, make_toy: Callable[..., Any], small_config: Any) -> tuple[Path, torch.Tensor]:
    """A file of a LoRA of 2 ranks and scale 2, and its output on the test images."""
    model, _ = make_toy(small_config("lora", num_ranks=2, scale=2.0))
    path = save_adapters(tmp_path / "lora.safetensors", model, base_id="toy")
    return path, model


def mixture(toy: Any, config: MoRConfig, scores: torch.Tensor) -> Any:
    torch.manual_seed(0)
    model = toy().eval()
    inject(model, config, condition_dim=scores.shape[1])
    routing_context(model).condition = scores
    return model


def test_a_lora_becomes_shared_ranks(lora: Any, toy: Any, small_config: Any, images: Any, scores: Any) -> None:
    path, source = lora
    model = mixture(toy, small_config("mor", scale=0.5), scores)
    assert "2 ranks" in start_from_adapters(path, model, base_id="toy")
    torch.testing.assert_close(model(images), source(images))


def test_the_same_configuration_takes_all_of_it(
    tmp_path: Path, toy: Any, make_toy: Any, small_config: Any, images: Any, scores: Any
) -> None:
    source, report = make_toy(small_config("mor"))
    report.context.condition = scores
    path = save_adapters(tmp_path / "mor.safetensors", source)
    model = mixture(toy, small_config("mor"), scores)
    start_from_adapters(path, model)
    routing_context(model).condition = scores
    torch.testing.assert_close(model(images), source(images))


def test_a_mixture_with_fewer_shared_ranks_gains_idle_ones(
    tmp_path: Path, toy: Any, make_toy: Any, small_config: Any, images: Any, scores: Any
) -> None:
    small = small_config("mor")
    large = replace(small, num_ranks=small.num_ranks + 3, num_shared=small.num_shared + 3)
    source, report = make_toy(small)
    report.context.condition = scores
    path = save_adapters(tmp_path / "mor.safetensors", source)
    model = mixture(toy, large, scores)
    said = start_from_adapters(path, model)
    assert routing_context(model).routing is None, "what the old router decided"
    assert f"{small.num_shared} shared ranks as the first of {large.num_shared}" in said
    routing_context(model).condition = scores
    torch.testing.assert_close(model(images), source(images))
    shrunk = mixture(toy, small, scores)
    with pytest.raises(WeightsError, match=f"num_shared={large.num_shared}"):
        start_from_adapters(save_adapters(tmp_path / "large.safetensors", model), shrunk)


def test_a_mixture_on_other_layers_does_not_grow(
    tmp_path: Path, toy: Any, make_toy: Any, small_config: Any, scores: Any
) -> None:
    small = small_config("mor", targets=("to_q",))
    path = save_adapters(tmp_path / "mor.safetensors", make_toy(small)[0])
    wider = small_config("mor", num_ranks=small.num_ranks + 1, num_shared=small.num_shared + 1)
    with pytest.raises(WeightsError, match="no ranks for layers"):
        start_from_adapters(path, mixture(toy, wider, scores))


@pytest.mark.parametrize(
    ("settings", "base_id", "words"),
    [
        ({"num_shared": 1}, "toy", "num_shared to at least 2"),
        ({"targets": ("to_q",)}, "toy", "targets leave out"),
        ({}, "toy+merged:0a1b2c3d", "made for the base 'toy'"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    settings: Any, base_id: str, words: str, lora: Any, toy: Any, small_config: Any, images: Any, scores: Any
) -> None:
    model = mixture(toy, small_config("mor", **settings), scores)
    before = model(images)
    with pytest.raises(WeightsError, match=words):
        start_from_adapters(lora[0], model, base_id=base_id)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_equal_weights_under_another_id_are_taken_with_a_warning(
    lora: Any, toy: Any, small_config: Any, images: Any, scores: Any
) -> None:
    path, source = lora
    model = mixture(toy, small_config("mor"), scores)
    with pytest.warns(UserWarning, match="'toy', taken for 'other': their weights agree"):
        start_from_adapters(path, model, base_id="other")
    torch.testing.assert_close(model(images), source(images))
    near = mixture(toy, small_config("mor"), scores)
    with torch.no_grad():
        near.to_q.weight.mul_(1.005)  # what a copy in half precision does not come to
    with pytest.raises(WeightsError, match="made for the base 'toy', not for 'other'"):
        start_from_adapters(path, near, base_id="other")


def test_a_lora_of_a_base_with_the_same_id_and_other_weights_is_refused(
    lora: Any, toy: Any, small_config: Any, images: Any, scores: Any
) -> None:
    model = mixture(toy, small_config("mor"), scores)
    with torch.no_grad():
        model.to_q.weight.mul_(1.5)
    before = model(images)
    with pytest.raises(WeightsError, match="the weights of to_q differ"):
        start_from_adapters(lora[0], model, base_id="toy")
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_a_lora_of_as_many_ranks_is_rescaled(lora: Any, make_toy: Any, small_config: Any, images: Any) -> None:
    path, source = lora
    model, _ = make_toy(small_config("lora", num_ranks=2, scale=0.5), filled=False)
    start_from_adapters(path, model, base_id="toy")
    torch.testing.assert_close(model(images), source(images))


def test_scores_in_another_order_are_refused(
    tmp_path: Path, toy: Any, make_toy: Any, small_config: Any, scores: Any
) -> None:
    small = small_config("mor")
    source, report = make_toy(small)
    report.context.condition_names = ("blur", "noise", "jpeg")
    path = save_adapters(tmp_path / "mor.safetensors", source)
    for more in (0, 3):
        config = replace(small, num_ranks=small.num_ranks + more, num_shared=small.num_shared + more)
        model = mixture(toy, config, scores)
        context = routing_context(model)
        context.condition_names = ("noise", "blur", "jpeg")
        with pytest.raises(
            WeightsError, match="reads the scores blur, noise, jpeg, this set's reads noise, blur, jpeg"
        ):
            start_from_adapters(path, model)
        assert context.condition_names == ("noise", "blur", "jpeg")
    same = mixture(toy, small, scores)
    routing_context(same).condition_names = ("noise", "blur", "jpeg")
    with pytest.raises(WeightsError, match="reads the scores"):
        load_adapters(path, same)
