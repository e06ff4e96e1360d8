"""The bootstrap: coverage over seeds and photographs, and what a paired comparison leaves out."""

import math

import numpy as np
import pytest

from morsr.errors import InputError
from morsr.evaluation.comparison import verdict_of
from morsr.evaluation.statistics import Interval, bootstrap, paired_difference
from morsr.models.metrics import METRICS


@pytest.mark.parametrize(
    ("seeds", "photographs", "copies", "seed_spread", "least"),
    [(1, 40, 1, 0.0, 0.89), (1, 25, 6, 0.0, 0.86), (8, 30, 2, 1.0, 0.83), (20, 40, 1, 2.0, 0.87)],
)
def test_intervals_cover_the_truth(seeds, photographs, copies, seed_spread, least):
    generator = np.random.default_rng(0)
    groups = [f"p{index // copies}" for index in range(photographs * copies)]
    hits = 0
    for trial in range(200):
        luck = generator.normal(0, seed_spread, (seeds, 1))
        photograph = generator.normal(0, 1, photographs).repeat(copies)
        values = 0.5 + luck + photograph + generator.normal(0, 0.3, (seeds, len(groups)))
        found = bootstrap(values, groups, resamples=300, seed=trial)
        assert found.count == photographs
        hits += found.low <= 0.5 <= found.high
    assert least <= hits / 200 <= 0.99


@pytest.mark.parametrize(("values", "groups"), [([], None), ([1.0, math.nan], None), ([1.0, 2.0], ["a"])])
def test_what_has_no_interval(values, groups):
    with pytest.raises(InputError):
        bootstrap(values, groups)


def test_paired_difference_and_its_verdict():
    reference = {f"i{k}": float(k) for k in range(20)}
    better = {name: value + 0.5 + 0.01 * (value % 3) for name, value in reference.items()}
    interval = paired_difference([better], [reference])
    assert interval.count == 20
    assert interval.low > 0.49
    assert verdict_of(METRICS["psnr"], interval) == "better"
    assert verdict_of(METRICS["niqe"], interval) == "worse"
    assert not Interval(0.3, 0.3, 0.3, 1).excludes_zero
    assert not Interval(1e-6, 1e-7, 2e-6, 100).excludes_zero, "rounding"
    assert paired_difference([{**better, "i0": math.nan}], [reference]).count == 19
    worse = {name: value - 0.4 for name, value in reference.items()}
    assert not paired_difference([better, worse], [reference, reference]).excludes_zero, "seeds disagree"
    with pytest.raises(InputError):
        paired_difference([{"a": 1.0}], [{"b": 1.0}])
