from __future__ import annotations

import argparse

import pytest

from morsr.bench import adapter
from morsr.errors import ConfigError


def arguments(*words):
    parser = argparse.ArgumentParser()
    adapter.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.slow
def test_quick_benchmark_measures_every_row():
    pytest.importorskip("peft")
    table = adapter.run(arguments("--quick", "--tiles", "8"))
    rows = {row["what"]: row for row in table["rows"]}
    assert sum("training step" in what for what in rows) == 4
    assert all(row["ratio"] > 0 for row in rows.values())
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows.values() if "low" in row)
    operations = rows["operations of a pass: MoR gathered / bare"]["ratio"]
    assert 1.0 < operations < 2.0
    assert table["settings"]["layers"] == 73
    kept = [row["ratio"] for what, row in rows.items() if what.endswith("memory")]
    assert max(kept) < 1.02


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--batch", "0"], "--batch"), (["--latent", "12"], "multiple of 8"), (["--seconds", "0"], "--seconds")],
)
def test_bad_numbers(words, message):
    with pytest.raises(ConfigError, match=message):
        adapter.run(arguments(*words))
