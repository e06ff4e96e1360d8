"""`morsr bench train` and `morsr bench inference` on a small random base."""

import argparse
import time
from typing import Any

import pytest
import torch

from morsr.bench import inference, train
from morsr.bench._parts import Stopwatch
from morsr.errors import ConfigError


def measure(module: Any, *options: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(["--quick", "--device", "cpu", *options]))


def test_every_part_of_a_step_is_timed_and_they_add_up() -> None:
    result = measure(train, "--no-warm-up", "--checkpointing", "--base-dtype", "bfloat16")
    rows = {row["what"]: row for row in result["rows"]}
    for part in ("degrade", "encode", "UNet", "decode", "VSD: score network once, teacher twice", "balance",
                 "backward/generator", "optimizer/generator", "score network's own loss", "backward/score",
                 "encode HR for the discriminator", "backward/discriminator", "estimator and router"):  # fmt: skip
        assert rows[part]["seconds"] > 0, part
    shares = [row["share"] for row in result["rows"] if row["what"] != "step" and "share" in row]
    assert sum(shares) == pytest.approx(1)
    assert result["settings"]["peak memory GiB"] > 0
    assert rows["25000 steps of batch 2, 32²"]["hours"] == pytest.approx(rows["step"]["seconds"] * 25000 / 3600)


def test_inference_is_set_against_the_bare_base() -> None:
    for ranks in ("gathered", "merged"):
        whole, *parts = measure(inference, "--ranks", ranks)["rows"]
        assert whole["what"] == "pass, own decoder / bare base"
        assert 0 < whole["low"] <= whole["ratio"] <= whole["high"]
        assert {row["what"].split(" (")[0] for row in parts} >= {"estimator and router", "encode", "UNet", "decode"}


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (train, ["--steps", "0"], "--steps: expected at least 1"),
        (train, ["--size", "33"], "--size: expected a multiple of 4"),
        (inference, ["--rounds", "0"], "--rounds: expected at least 1"),
        (inference, ["--ranks", "merged", "--batch", "2"], "--ranks merged"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(module: Any, options: list[str], words: str) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    with pytest.raises(ConfigError, match=words):
        module.run(parser.parse_args(["--device", "cpu", "--base", "tiny", *options]))


def test_nested_parts_count_their_own_time_alone() -> None:
    class Worker:
        def nap(self) -> None:
            time.sleep(0.02)

    watch, worker = Stopwatch(torch.device("cpu")), Worker()
    with watch.watched(worker, {"nap": "nap"}, within="outer"):
        start = time.perf_counter()
        with watch.part("outer"):
            time.sleep(0.01)
            worker.nap()
        whole = time.perf_counter() - start
        with watch.part("elsewhere"):
            worker.nap()
    seconds = {name: spent[0] for name, spent in watch.seconds.items()}
    assert set(seconds) == {"outer", "nap", "elsewhere"}
    assert seconds["nap"] >= 0.02
    assert 0.01 <= seconds["outer"] <= whole - 0.02
    assert seconds["elsewhere"] >= 0.02
    worker.nap()
    assert "nap" not in vars(worker)
