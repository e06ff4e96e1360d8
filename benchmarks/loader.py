"""How long the training waits for its data: time in the loader over time of the steps, by Lightning's own profiler.

    python benchmarks/loader.py [--config experiments/mor_tiny.yaml] [--workers 2] [--steps 100] [--train FOLDER]

The first fetches, which start the workers, are left out. By default photographs are decoded anew for every crop
(`cache_mb` 0), as a set that does not fit into memory needs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from lightning.pytorch.profilers import SimpleProfiler

from morsr.cli import main as morsr

FETCH, STEP = "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"


class WaitProfiler(SimpleProfiler):
    """Writes every recorded duration of the loader and of the steps, in seconds, to one JSON file."""

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path)

    def describe(self) -> None:
        found = {name: list(self.recorded_durations.get(name, [])) for name in (FETCH, STEP)}
        if found[STEP]:
            self.path.write_text(json.dumps(found), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Train for some steps and print the share of time spent in waiting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/mor_tiny.yaml")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skip", type=int, default=5, help="fetches at the start that do not count (default: 5)")
    parser.add_argument("--cache-mb", type=float, default=0.0)
    parser.add_argument("--train", help="folder of photographs (default: the config's)")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "durations.json"
        code = morsr(
            [
                "fit", "--config", options.config, f"--trainer.max_steps={options.steps}",
                "--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.enable_checkpointing=false",
                "--trainer.callbacks=null", f"--trainer.default_root_dir={folder}",
                "--trainer.profiler.class_path=loader.WaitProfiler", f"--trainer.profiler.init_args.path={record}",
                f"--data.init_args.num_workers={options.workers}", f"--data.init_args.cache_mb={options.cache_mb}",
                *([f"--data.init_args.train=[{options.train}]"] if options.train else []),
            ]
        )  # fmt: skip
        if code:
            return code
        durations = {name: np.array(values) for name, values in json.loads(record.read_text()).items()}
    fetch, step = durations[FETCH][options.skip : options.steps], durations[STEP][options.skip :]
    print(
        f"{len(step)} steps of {step.mean():.3f} s; fetches of {fetch.mean() * 1e3:.2f} ms, the longest "
        f"{fetch.max() * 1e3:.1f} ms; waiting {fetch.sum() / (fetch.sum() + step.sum()):.2%} of the time"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
