"""The script for the first GPU runs on a processor at a tiny size, and its table holds what it promises."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest


def test_the_gpu_script_in_a_dry_run(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    sizes = ["--base=random:small", "--size=32", "--batches", "1", "2", "--rounds=1", "--out=gpu.json"]
    importlib.import_module("gpu").main(sizes)
    rows = {row["what"]: row for row in json.loads(Path("gpu.json").read_text())["rows"]}
    assert rows["degradation, batch 2"]["images/s"] > 0
    assert all(rows[f"step, {part}"]["ours"] > 0 for part in ("forward", "backward", "update"))
    assert rows["step, whole"]["MB above weights"] > 0
    for batch in (1, 2):
        row = rows[f"adapters over bare, batch {batch}"]
        assert row["low"] <= row["ratio"] <= row["high"]
    assert "| step, whole |" in capsys.readouterr().out
