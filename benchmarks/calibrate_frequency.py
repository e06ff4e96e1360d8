"""Measure the constants of the frequency estimator on degraded photographs and write them as JSON.

    python benchmarks/calibrate_frequency.py PHOTOGRAPHS --out src/morsr/estimators/frequency_calibration.json

Every photograph is degraded by the recipe several times, and by one factor alone. `blur`, `noise`, `jpeg`, `resize` and
`overall` are ridge regressions of the known ranks on the statistics, their squares and products of a few; the other
dimensions are single statistics. All get a monotone curve onto [0, 1]: the composites so that scores are ranks again
(isotonic in quantiles), the single statistics by their own quantiles.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from morsr.data.sources import find_photos
from morsr.degradation import DegradationRecipe, apply, sample_keys, true_severity
from morsr.estimators.frequency import expand
from morsr.estimators.statistics import image_statistics
from morsr.imaging import read_rgb
from morsr.training.estimator import FACTOR_RANGES, single_factor, single_factor_ranks, with_mean

COMPOSITES = ("blur", "noise", "jpeg", "resize", "overall")
# single statistics with the sign that turns lost detail, or visible blocks, into high values
SINGLES = {"band_low": 1, "band_mid": -1, "band_high": -1, "band_top": -1, "low_to_high": 1, "block": 1}
# statistics that enter as products of two as well: noise hides edges, blur hides blocks
PAIRED = (
    "noise", "noise_half", "noise_next", "edge_ratio", "gradient_loss", "gradient_tail", "block_zeros", "table",
    "band_top", "low_to_high", "dct_middle_flat", "dct_fine_flat", "chroma_fine",
)  # fmt: skip
CURVE = 17  # knots of every curve

Array = NDArray[np.float64]


def to_hr(path: str) -> torch.Tensor:
    """A photograph (1, 3, H, W) in [0, 1], cropped to multiples of 16."""
    image = torch.from_numpy(read_rgb(path).copy()).permute(2, 0, 1)[None].float() / 255
    height, width = (length // 16 * 16 for length in image.shape[-2:])
    return image[..., :height, :width]


def measure(lr: torch.Tensor) -> list[float]:
    """The statistics of one image, by the code of the estimator."""
    return [float(value[0]) for value in image_statistics(lr).values()]


def collect(paths: list[str], draws: int, recipe_name: str, seed: int) -> tuple[Array, Array, Array]:
    """Statistics (n, S), ranks (n, 5) and weights (n,) of all degraded photographs; single factors weigh 0.6 in all."""
    recipe = DegradationRecipe.load(recipe_name)
    generator = torch.Generator().manual_seed(seed)
    values: list[list[float]] = []
    targets: list[torch.Tensor] = []
    single: list[bool] = []

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for number, path in enumerate(tqdm(paths, desc="photographs", unit="image")):
        hr = to_hr(path)
        parameters = recipe.sample(sample_keys(seed, number, torch.arange(draws)))
        truth = with_mean(torch.stack(true_severity(parameters, recipe_name)[:4], dim=1))
        for place in range(draws):
            values.append(measure(apply(hr, parameters[place])))
            targets.append(truth[place : place + 1])
            single.append(False)
        for factor in ("clean", *FACTOR_RANGES, *FACTOR_RANGES):
            value = uniform(*FACTOR_RANGES.get(factor, (0.0, 0.0)))
            gray = uniform(0, 1) < 0.4
            values.append(measure(single_factor(hr, factor, value, key=number, gray=gray)))
            targets.append(single_factor_ranks(factor, value, recipe))
            single.append(True)
    alone = np.array(single)
    weights = np.where(alone, 0.6 * (~alone).sum() / alone.sum(), 1.0)
    return np.array(values), torch.cat(targets).double().numpy(), weights


def curve(values: Array, weights: Array) -> list[float]:
    """Knots at equal steps of the weighted distribution: the score becomes a rank."""
    order = values.argsort()
    share = np.cumsum(weights[order]) / weights.sum()
    knots = np.interp(np.linspace(0.005, 0.995, CURVE), share, values[order])
    return [round(float(knot), 5) for knot in np.maximum.accumulate(knots) + 1e-5 * np.arange(CURVE)]


def composite_curve(values: Array, target: Array, weights: Array) -> list[float]:
    """Knots at which the mean target passes equal steps from 0 to 1, by pooled neighbours (isotonic regression)."""
    order = values.argsort()
    groups = np.array_split(order, 60)
    found = np.array([np.average(values[group], weights=weights[group]) for group in groups])
    level = np.maximum.accumulate(np.array([np.average(target[group], weights=weights[group]) for group in groups]))
    # the mean target never reaches the ends of [0, 1]: stretched, so that the score uses its range
    level = (level - level[0]) / max(level[-1] - level[0], 1e-6) + 1e-9 * np.arange(len(level))
    knots = np.interp(np.linspace(0, 1, CURVE), level, found)
    return [round(float(knot), 5) for knot in np.maximum.accumulate(knots) + 1e-5 * np.arange(CURVE)]


def calibrate(names: list[str], values: Array, targets: Array, weights: Array, ridge: float = 1.0) -> dict[str, object]:
    """The estimator's constants, as `FrequencyEstimator` reads them."""
    low, high = np.quantile(values, 0.005, axis=0), np.quantile(values, 0.995, axis=0)
    high = np.maximum(high, low + 1e-3)
    pairs = [names.index(name) for name in PAIRED]
    clipped = torch.from_numpy(np.clip((values - low) / (high - low), 0, 1) * 2 - 1)
    terms = expand(clipped, torch.tensor(pairs)).numpy()
    design = np.concatenate([terms, np.ones((len(terms), 1))], axis=1)
    fitted = np.linalg.solve(
        design.T @ (design * weights[:, None]) + ridge * np.eye(design.shape[1]),
        design.T @ (targets * weights[:, None]),
    )[:-1].T
    dimensions: dict[str, object] = {}
    for name, sign in SINGLES.items():
        row = np.zeros(terms.shape[1])
        row[names.index(name)] = sign
        dimensions[name] = {"weights": {str(names.index(name)): sign}, "knots": curve(terms @ row, weights)}
    for index, name in enumerate(COMPOSITES):
        row = np.round(fitted[index], 5)
        dimensions[name] = {
            "weights": {str(place): float(value) for place, value in enumerate(row) if value},
            "knots": composite_curve(terms @ row, targets[:, index], weights),
        }
    return {
        "statistics": names,
        "low": [round(float(value), 5) for value in low],
        "high": [round(float(value), 5) for value in high],
        "pairs": pairs,
        "dimensions": dimensions,
    }


def main(arguments: list[str] | None = None) -> int:
    """Collect, calibrate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", help="folder of sharp photographs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--draws", type=int, default=12, help="recipe draws per photograph (default: 12)")
    parser.add_argument("--recipe", default="realesrgan")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    paths = [photo.hr for photo in find_photos(options.photographs)]
    names = list(image_statistics(torch.zeros(1, 3, 16, 16)))
    with torch.no_grad():
        values, targets, weights = collect(list(paths), options.draws, options.recipe, options.seed)
    options.out.write_text(json.dumps(calibrate(names, values, targets, weights)) + "\n", encoding="utf-8")
    print(f"{len(values)} images -> {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
