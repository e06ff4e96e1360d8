"""A stranger's path, timed: clone, setup, first picture, `make train`, the estimator of docs/extend.md.

    python benchmarks/stranger.py

Works in a temporary folder with a fresh clone of this one. The package cache should be warm, as after one installation.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    fit = ".venv/bin/morsr fit --config experiments/tiny/mor.yaml --trainer.max_steps=2 --trainer.limit_val_batches=1"
    steps = [
        ("clone and setup", 60, f"git clone -q {Path(__file__).resolve().parents[1]} . && make setup"),
        ("first picture", 90, ".venv/bin/morsr upscale sample:chelsea out.png"),
        ("make train", 360, "make train"),
        ("own estimator, 2 steps", 90, f"{fit} --model.estimator=mine.Darkness"),
    ]
    print(f"load average at the start: {os.getloadavg()[0]:.1f}\n")
    print("| step | seconds | goal |\n|---|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name, goal, command in steps:
            if "mine." in command:
                page = Path(folder, "docs/extend.md").read_text(encoding="utf-8")
                Path(folder, "mine.py").write_text(page.split("```")[1].removeprefix("python\n"), encoding="utf-8")
            started = time.perf_counter()
            subprocess.run(["bash", "-ec", command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            print(f"| {name} | {time.perf_counter() - started:.0f} | {goal} |", flush=True)
