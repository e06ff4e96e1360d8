"""The script for the first GPU runs on a processor at a tiny size, and its table holds what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.timeout(300)
def test_the_gpu_script_in_a_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    sizes = ["--base", "random:small", "--size", "64", "--batches", "1", "2", "--rounds", "1"]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *sizes, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["what"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["degradation, batch 2"]["images/s"] > 0
    parts = sum(rows[f"step, {part}"]["ours"] for part in ("forward", "backward", "update"))
    assert parts > 0
    assert rows["step, whole"]["MB above weights"] > 0
    for batch in (1, 2):
        row = rows[f"adapters over bare, batch {batch}"]
        assert row["low"] <= row["ratio"] <= row["high"]
    assert "| step, whole |" in done.stdout
