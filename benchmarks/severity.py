"""Severity against the strength of each degradation alone: Spearman's rho, mean over photographs.

python benchmarks/severity.py FOLDER [--photographs 10] [--levels 8]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import stats

from morsr.estimators import build_estimator
from morsr.training.estimator import FACTOR_RANGES, single_factor


def photograph(path: Path, side: int = 1024) -> torch.Tensor:
    """A photograph (1, 3, H, W) in [0, 1], at most `side` pixels high and wide."""
    image = Image.open(path, formats=("JPEG", "PNG")).convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def main() -> None:
    """Print one row per estimator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--photographs", type=int, default=10)
    parser.add_argument("--levels", type=int, default=8)
    options = parser.parse_args()
    paths = sorted(path for path in Path(options.folder).rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    chosen = [paths[place] for place in np.linspace(0, len(paths) - 1, options.photographs).astype(int)]
    for name in ("learned", "frequency"):
        estimator, found = build_estimator(name), {factor: [] for factor in FACTOR_RANGES}
        for hr in map(photograph, chosen):
            for factor, bounds in FACTOR_RANGES.items():
                levels = np.linspace(*bounds, options.levels)
                lr = torch.cat([single_factor(hr, factor, level, key=key) for key, level in enumerate(levels)])
                sign = -1 if factor == "jpeg" else 1  # a low quality is strong
                found[factor].append(sign * stats.spearmanr(levels, estimator(lr).severity).statistic)
        print(f"{name:10}", "  ".join(f"{factor} {np.mean(rhos):.3f}" for factor, rhos in found.items()))


if __name__ == "__main__":
    main()
