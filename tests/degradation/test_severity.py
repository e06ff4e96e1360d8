"""True severity: ranks, their order, and the noise measure against what the chain leaves."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from morsr.degradation import (
    DegradationParameters,
    DegradationRecipe,
    apply,
    degradation_measures,
    sample_keys,
    true_severity,
)
from morsr.degradation import pipeline as pipeline_module
from morsr.functional import corrupt
from morsr.functional.severity import noisy_or

RECIPE = DegradationRecipe()


def _change(parameters: DegradationParameters, **values: float) -> DegradationParameters:
    """Set fields, named as stage__field or stage__blur__field, to one value for all images."""
    for name, value in values.items():
        stage_name, *inner = name.split("__")
        stage = getattr(parameters, stage_name)
        part = stage.blur if inner[0] == "blur" else stage
        changed = dataclasses.replace(part, **{inner[-1]: torch.full_like(getattr(part, inner[-1]), value)})
        stage = dataclasses.replace(stage, blur=changed) if inner[0] == "blur" else changed
        parameters = dataclasses.replace(parameters, **{stage_name: stage})
    return parameters


def test_labels_are_uniform_ranks_and_severity_is_their_noisy_or():
    labels = true_severity(RECIPE.sample(sample_keys(9, 0, torch.arange(2000))), RECIPE)
    for name in ("blur", "noise", "jpeg"):
        assert stats.kstest(getattr(labels, name).numpy(), "uniform").pvalue > 1e-4
    expected = 1 - (1 - labels.blur) * (1 - labels.noise) * (1 - labels.jpeg)  # resize takes no part
    torch.testing.assert_close(labels.combined, expected)


def test_a_recipe_that_cannot_be_hashed_gives_the_same_labels():
    @dataclasses.dataclass
    class Mine:
        strength: float = 1.0

        def sample(self, key: Tensor) -> DegradationParameters:
            return RECIPE.sample(key)

    drawn = RECIPE.sample(sample_keys(9, 0, torch.arange(8)))
    torch.testing.assert_close(true_severity(drawn, Mine()), true_severity(drawn, RECIPE))


def test_severity_of_named_scores():
    scores = torch.tensor([[0.0, 0.9, 0.2, 0.0], [0.5, 0.0, 0.5, 0.5]])
    found = noisy_or(scores, ("blur", "resize", "compression", "noise"))
    torch.testing.assert_close(found, torch.tensor([0.2, 0.875]))
    torch.testing.assert_close(noisy_or(scores, ("rain", "fog", "dust", "worst")), torch.tensor([0.92, 0.75]))


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("blur", [{"first__blur__kind": 0, "first__blur__sigma_x": sigma} for sigma in (0.2, 1.0, 3.0)]),
        ("noise", [{"second__noise_kind": 0, "second__noise_level": level} for level in (1.0, 8.0, 25.0)]),
        ("jpeg", [{"second__jpeg_quality": quality} for quality in (95.0, 60.0, 30.0)]),
        ("resize", [{"first__resize_scale": factor} for factor in (0.24, 0.2, 0.15)]),
    ],
)
def test_a_worse_parameter_never_lowers_its_rank(which, changes):
    parameters = RECIPE.sample(torch.arange(50))
    ranks = torch.stack([getattr(true_severity(_change(parameters, **change), RECIPE), which) for change in changes])
    assert bool((ranks.diff(dim=0) >= 0).all())
    assert bool((ranks[-1] > ranks[0]).any())


def test_known_widths():
    pixel = 0.0904  # the box of one LR pixel less that of an HR pixel, at half response
    still = {"second__blur__kind": 7, "final__blur__kind": 7, "first__blur__size": 21}
    plain = {"first__resize_scale": 1, "second__resize_scale": 1, "second__resize_mode": 0}
    parameters = _change(
        RECIPE.sample(torch.arange(1)), first__blur__kind=0, first__blur__sigma_x=2.0, **still, **plain
    )
    assert degradation_measures(parameters).blur.item() == pytest.approx(np.sqrt((2 / 4) ** 2 + pixel), rel=0.02)
    both = _change(parameters, second__blur__kind=0, second__blur__size=21, second__blur__sigma_x=1.5)
    both = _change(both, first__resize_scale=0.5, first__resize_mode=0)  # now a pixel is two HR pixels
    expected = np.sqrt((2 / 4) ** 2 + (3 / 4) ** 2 + pixel)
    assert degradation_measures(both).blur.item() == pytest.approx(expected, rel=0.02)
    none = _change(parameters, first__blur__kind=7)
    assert degradation_measures(none).blur.item() == pytest.approx(np.sqrt(pixel), rel=0.02)
    sinc = _change(none, final__blur__kind=6, final__blur__cutoff=np.pi / 3)
    assert degradation_measures(sinc).blur.item() == pytest.approx(np.sqrt(2 * np.log(2)) * 3 / np.pi, rel=0.06)
    coarse = _change(none, second__resize_scale=0.3, final__resize_mode=1)  # a box and a triangle of a wide grid
    assert degradation_measures(coarse).blur.item() == pytest.approx(np.sqrt(0.0964 + 0.1789) / 0.3, rel=0.04)


def test_the_noise_measure_is_what_the_chain_leaves(monkeypatch):
    monkeypatch.setattr(pipeline_module, "jpeg", lambda image, quality: image)
    monkeypatch.setattr(corrupt, "_count_levels", lambda index: torch.tensor(256.0))
    parameters = RECIPE.sample(torch.arange(80))
    # Small enough to stay away from the clamp, which the measure leaves out.
    stages = {
        name: dataclasses.replace(getattr(parameters, name), noise_level=getattr(parameters, name).noise_level * 0.25)
        for name in ("first", "second")
    }
    parameters = dataclasses.replace(parameters, **stages)
    left: Tensor = apply(torch.full((80, 3, 160, 160), 0.5), parameters) * 255
    found = (left.var(dim=(2, 3)).mean(dim=1) - 1 / 12).clamp_min(0).sqrt()
    expected = degradation_measures(parameters).noise
    ratio = (found / expected)[expected > 1]
    assert 0.9 < ratio.median() < 1.1
    assert ratio.quantile(0.05) > 0.6
    assert ratio.quantile(0.95) < 1.6
    assert stats.spearmanr(found, expected).statistic > 0.9


@pytest.mark.parametrize("mode", [1, 2])  # bilinear, bicubic
def test_the_noise_that_one_resize_leaves(mode):
    none = {f"{part}__blur__kind": 7 for part in ("first", "second", "final")}
    first = {"first__resize_scale": 0.43, "first__noise_kind": 0, "first__noise_level": 8.0, "first__noise_gray": 0}
    second = {"second__resize_scale": 1.0, "second__resize_mode": mode, "second__noise_level": 0.0}
    plain = {"first__jpeg_quality": 101.0, "second__jpeg_quality": 101.0}
    parameters = _change(RECIPE.sample(torch.arange(4)), **none, **first, **second, **plain)
    left: Tensor = apply(torch.full((4, 3, 512, 512), 0.5), parameters) * 255
    found = (left.var(dim=(2, 3)).mean(dim=1) - 1 / 12).sqrt().double()
    torch.testing.assert_close(found, degradation_measures(parameters).noise, rtol=0.04, atol=0)
