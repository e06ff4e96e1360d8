"""The script for the first GPU runs on a processor at a tiny size, and memory is counted as it grows."""

import importlib
import json
from pathlib import Path


def test_the_gpu_script_in_a_dry_run(repo_root, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    importlib.import_module("gpu").main("random:small", 32, (1, 2), rounds=1, out=Path("gpu.json"))
    rows = {row["what"]: row for row in json.loads(Path("gpu.json").read_text())["rows"]}
    assert rows["degradation, batch 2"]["images/s"] > 0
    assert all(rows[f"step, {part}"]["ours"] > 0 for part in ("forward", "backward", "update"))
    assert rows["step, whole"]["MB above weights"] > 0
    for batch in (1, 2):
        row = rows[f"adapters over bare, batch {batch}"]
        assert row["low"] <= row["ratio"] <= row["high"]
    assert "| step, whole |" in capsys.readouterr().out


def test_counted_memory_grows_with_the_image_and_falls_by_checkpointing(repo_root, monkeypatch):
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    memory = importlib.import_module("memory")
    base = memory.adapted("small")
    small, large = (memory.activations(base, size, recomputed=False) for size in (64, 128))
    assert 3.5 * small < large < 4.5 * small  # four times the pixels, and fused attention keeps no matrix
    assert memory.activations(base, 128, recomputed=True) < 0.8 * large
