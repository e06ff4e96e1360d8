"""True severity: ranks, their order, and the noise measure against what the chain leaves."""

from __future__ import annotations

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
    degrade,
    sample_keys,
    true_severity,
)
from morsr.degradation import pipeline as pipeline_module
from morsr.errors import InputError
from morsr.functional import corrupt

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


def test_ranks_fill_the_unit_interval_evenly() -> None:
    severity = true_severity(RECIPE.sample(sample_keys(9, 0, torch.arange(4000))), RECIPE)
    for name in ("blur", "noise", "jpeg"):
        rank = getattr(severity, name)
        assert stats.kstest(rank.numpy(), "uniform").pvalue > 1e-4
    for rank in severity:
        assert rank.min() >= 0
        assert rank.max() <= 1
        assert rank.dtype == torch.float32
        assert rank.mean().item() == pytest.approx(0.5, abs=0.02)
    mean = torch.stack(severity[:4]).mean(dim=0)
    torch.testing.assert_close(severity.combined, mean)


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("blur", [{"first__blur__kind": 0, "first__blur__sigma_x": sigma} for sigma in (0.2, 1.0, 3.0)]),
        ("noise", [{"second__noise_kind": 0, "second__noise_level": level} for level in (1.0, 8.0, 25.0)]),
        ("jpeg", [{"second__jpeg_quality": quality} for quality in (95.0, 60.0, 30.0)]),
        ("resize", [{"first__resize_scale": factor} for factor in (0.24, 0.2, 0.15)]),
    ],
)
def test_a_worse_parameter_never_lowers_its_rank(which: str, changes: list[dict[str, float]]) -> None:
    parameters = RECIPE.sample(torch.arange(50))
    ranks = torch.stack([getattr(true_severity(_change(parameters, **change), RECIPE), which) for change in changes])
    assert bool((ranks.diff(dim=0) >= 0).all())
    assert bool((ranks[-1] > ranks[0]).any())


def test_a_recipe_ranks_within_itself() -> None:
    light = DegradationRecipe.from_preset("light")
    parameters = light.sample(torch.arange(500))
    assert true_severity(parameters, light).combined.mean().item() == pytest.approx(0.5, abs=0.03)
    assert true_severity(parameters, "realesrgan").combined.mean() < 0.2


def test_known_widths() -> None:
    still = {"second__blur__kind": 7, "final__blur__kind": 7, "first__blur__size": 21}
    parameters = _change(RECIPE.sample(1), first__blur__kind=0, first__blur__sigma_x=2.0, **still)
    assert degradation_measures(parameters).blur.item() == pytest.approx(2.0 / 4, rel=1e-3)
    both = _change(parameters, second__blur__kind=0, second__blur__size=21, second__blur__sigma_x=1.5)
    both = _change(both, first__resize_scale=0.5)  # one pixel of the second blur is two HR pixels
    expected = np.hypot(2.0, 3.0) / 4
    assert degradation_measures(both).blur.item() == pytest.approx(expected, rel=1e-3)
    assert degradation_measures(_change(parameters, first__blur__kind=7)).blur.item() == 0


def test_the_noise_measure_is_what_the_chain_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_severity_follows_the_damage() -> None:
    from skimage import data

    hr = torch.from_numpy(data.coffee()[:128, 200:328].copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
    parameters = RECIPE.sample(torch.arange(100))
    lr = apply(hr.expand(100, -1, -1, -1), parameters)
    plain = degrade(hr, "light", generator=torch.Generator().manual_seed(0))
    error = (lr - plain).square().mean(dim=(1, 2, 3))
    assert stats.spearmanr(error, true_severity(parameters, RECIPE).combined).statistic > 0.25


def test_a_wrong_scale_is_refused() -> None:
    with pytest.raises(InputError, match="scale"):
        true_severity(RECIPE.sample(1), RECIPE, scale=0)
