from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from morsr.bench import _pairs, adapter
from morsr.bench._pairs import paired_ratio, peak_megabytes, time_pairs
from morsr.errors import ConfigError


def arguments(*words):
    parser = argparse.ArgumentParser()
    adapter.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.slow
def test_quick_benchmark_measures_every_row():
    pytest.importorskip("peft")
    table = adapter.run(arguments("--quick", "--tiles", "8", "--clock", "processor", "--threads", "1"))
    rows = {row["what"]: row for row in table["rows"]}
    assert sum("training step" in what for what in rows) == 4
    assert all(row["ratio"] > 0 for row in rows.values() if "ratio" in row)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows.values() if "low" in row)
    operations = {what: row["ratio"] for what, row in rows.items() if "GFLOP" in what}
    assert 1.0 < operations["operations (GFLOP): MoR gathered / bare"] < 1.5
    # Fixed shapes: in a gathered pass zero slots save nothing. In a merge 4 of 16 ranks are left out.
    assert operations["operations of a gathered pass (GFLOP): 4 of 8 places on zero slots / none"] == 1.0
    assert operations["operations of a merge (GFLOP): 4 of 8 places on zero slots / none"] == pytest.approx(0.75)
    assert table["settings"]["layers"] == 73
    assert rows["base weights copied by inject, MB; peer: all of them"]["ours"] == 0
    # At this size the gathered copies of the ranks weigh as much as the activations; at true size they do not.
    assert max(row["ratio"] for what, row in rows.items() if "peak memory" in what) < 1.1
    assert all(0 <= row["ratio"] < 1e-5 for what, row in rows.items() if what.startswith("parity"))


@pytest.mark.parametrize(("spread", "pairs"), [(0.0, 5), (0.2, 29)])
def test_pairs_end_when_the_interval_is_narrow_or_the_time_is_up(spread, pairs, monkeypatch):
    device, calls, now = torch.device("cpu"), [], 0.0

    def timed(call, _):
        nonlocal now
        seconds = 1.0 + spread * (len(calls) % 4 - 1.5)
        now += 1.0
        call()
        return seconds, seconds

    monkeypatch.setattr(_pairs, "_timed", timed)
    monkeypatch.setattr(_pairs.time, "perf_counter", lambda: now)
    times = time_pairs(lambda: calls.append(0), lambda: calls.append(1), seconds=60, clock=0, device=device)
    assert len(times.ours) == len(times.peer) == pairs
    # One untimed call each, then the order changes from pair to pair.
    assert calls[:6] == [0, 1, 0, 1, 1, 0]
    assert len(calls) == 2 * pairs + 2


def test_ratio_of_pairs():
    ratio, low, high = paired_ratio(np.array([2.0, 4.0, 8.0, 6.0, 1.0]), np.array([1.0, 2.0, 4.0, 3.0, 0.5]))
    assert (ratio, low, high) == pytest.approx((2.0, 2.0, 2.0))
    spread = paired_ratio(np.exp(np.array([0.1, -0.1, 0.2, -0.2, 0.0])), np.ones(5))
    # scipy.stats.t.ppf(0.975, 4) * std / sqrt(5), with std = sqrt(0.025)
    assert np.log(spread.high) == pytest.approx(2.7764 * 0.025**0.5 / 5**0.5, rel=5e-3)


def test_peak_memory_is_that_of_what_is_held_at_once():
    def call():
        first = torch.ones(250_000)
        second = first + 1
        del first
        return second * 2

    assert peak_megabytes(call, torch.device("cpu")) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--batch", "0"], "--batch"), (["--latent", "12"], "multiple of 8"), (["--seconds", "0"], "--seconds")],
)
def test_bad_numbers(words, message):
    with pytest.raises(ConfigError, match=message):
        adapter.run(arguments(*words))
