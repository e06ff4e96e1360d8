"""What the scripts share: two calls timed in turn, the memory that a call holds, and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark.utils.timer import timer

from morsr.evaluation.statistics import bootstrap


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call; the device is waited for."""
    start = timer()
    call()
    return float(timer() - start)


def compare(ours: Callable[[], Any], peer: Callable[[], Any], *, rounds: int = 9) -> dict[str, Any]:
    """Median seconds of both calls, timed in turn after one each that does not count, and the ratio (geometric mean
    over the rounds) with its 95 % bootstrap interval."""
    seconds(ours), seconds(peer)
    pairs = np.array([(seconds(ours), seconds(peer)) for _ in range(rounds)])
    found = bootstrap(np.log(pairs[:, 0] / pairs[:, 1]))
    first, second = np.median(pairs, axis=0).tolist()
    ratio, low, high = np.exp([found.mean, found.low, found.high]).tolist()
    return {"ours": first, "peer": second, "ratio": ratio, "low": low, "high": high}


def peak_megabytes(call: Callable[[], Any], device: torch.device) -> float:
    """Most memory that a call holds at one time beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = np.cumsum([size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")])
    return float(held.max(initial=0)) / 1e6


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as Markdown; a row that lacks a column leaves it empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        print("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
