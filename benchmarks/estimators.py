"""How well degradation scores follow the true degradations: Spearman correlations, separation, cost.

    python benchmarks/estimators.py PHOTOGRAPHS [--estimator frequency learned] [--clip FOLDER] [--json FILE]

Held-out photographs, whole, at a quarter of their size: one factor at a time (blur sigma 0.4 to 2 LR pixels, Gaussian
noise of 1 to 30 levels, JPEG quality 30 to 95), then the full Real-ESRGAN recipe; and the area under the ROC curve of
the severity between the shrunk photographs and the same degraded by the recipe. Intervals are 95 %, by bootstrap over
photographs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from morsr.data.images import list_images, load_image
from morsr.degradation import DegradationRecipe, apply, sample_keys, true_severity
from morsr.estimators import DegradationEstimator, build_estimator
from morsr.training.estimator import FACTOR_RANGES, single_factor, spearman

RANKS = ("blur", "noise", "jpeg", "resize", "combined")


def area_under_curve(negative: Tensor, positive: Tensor) -> float:
    """Probability that a degraded image scores above a clean one; ties count half."""
    order = negative.sort().values
    both = torch.searchsorted(order, positive.contiguous()) + torch.searchsorted(
        order, positive.contiguous(), right=True
    )
    return float(both.double().mean() / (2 * len(order)))


def collect(
    estimators: dict[str, DegradationEstimator], paths: list[str], draws: int, recipe_name: str, seed: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Scores per estimator and set (photographs, draws, D + 1), severity last, and the truth per set."""
    recipe = DegradationRecipe.load(recipe_name)
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, dict[str, list[Tensor]]] = {name: {} for name in estimators}
    truth: dict[str, list[Tensor]] = {}

    def add(group: str, images: list[Tensor], true: Tensor) -> None:
        for name, estimator in estimators.items():
            results = [estimator(image) for image in images]
            rows = torch.stack([torch.cat([result.scores[0], result.severity]).cpu() for result in results])
            scores[name].setdefault(group, []).append(rows)
        truth.setdefault(group, []).append(true)

    for number, path in enumerate(tqdm(paths, desc="photographs", unit="image")):
        hr = torch.from_numpy(load_image(path).copy()).permute(2, 0, 1)[None].float() / 255
        hr = hr[..., : hr.shape[-2] // 16 * 16, : hr.shape[-1] // 16 * 16]
        add("clean", [single_factor(hr, "clean", 0.0, key=0)], torch.zeros(1))
        for factor, (low, high) in FACTOR_RANGES.items():
            values = low + (high - low) * torch.rand(draws, generator=generator)
            gray = torch.rand(draws, generator=generator) < 0.4
            made = [
                single_factor(hr, factor, float(value), key=number * draws + place, gray=bool(gray[place]))
                for place, value in enumerate(values)
            ]
            add(factor, made, -values if factor == "jpeg" else values)
        parameters = recipe.sample(sample_keys(seed, number, torch.arange(draws)))
        severity = torch.stack(list(true_severity(parameters, recipe_name)), dim=1)
        add("recipe", [apply(hr, parameters[place]) for place in range(draws)], severity)
    return (
        {name: {group: torch.stack(rows) for group, rows in groups.items()} for name, groups in scores.items()},
        {group: torch.stack(rows) for group, rows in truth.items()},
    )


def with_interval(statistic: Callable[[Tensor], float], count: int, rounds: int = 300) -> tuple[float, float, float]:
    """A statistic of photograph numbers, over all of them and its 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    drawn = [statistic(torch.randint(count, (count,), generator=generator)) for _ in range(rounds)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return statistic(torch.arange(count)), float(low), float(high)


def summarise(
    estimator: DegradationEstimator, scores: dict[str, Tensor], truth: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """One row per figure: what, dimension, value and interval."""
    names = [*estimator.names, "severity"]
    count = len(truth["clean"])
    rows: list[dict[str, Any]] = []

    def column(group: str, name: str) -> Tensor:
        return scores[group][..., names.index(name)]

    def correlation(what: str, name: str, group: str, true: Tensor) -> None:
        found = column(group, name)
        value = with_interval(lambda chosen: float(spearman(found[chosen].flatten(), true[chosen].flatten())), count)
        rows.append({"figure": what, "dimension": name, "value": value[0], "low": value[1], "high": value[2]})

    for factor in FACTOR_RANGES:
        best = factor if factor in names else {"jpeg": "compression"}.get(factor, "severity")
        correlation(f"Spearman, {factor} alone", best if best in names else "severity", factor, truth[factor])
    for index, rank in enumerate(RANKS):
        name = "severity" if rank == "combined" else rank
        if name in names:
            correlation(f"Spearman, {rank} in the recipe", name, "recipe", truth["recipe"][..., index])
    clean, degraded = column("clean", "severity"), column("recipe", "severity")
    value = with_interval(lambda chosen: area_under_curve(clean[chosen].flatten(), degraded[chosen].flatten()), count)
    rows.append(
        {
            "figure": "ROC area, clean against recipe",
            "dimension": "severity",
            "value": value[0],
            "low": value[1],
            "high": value[2],
        }
    )
    return rows


def milliseconds(estimator: DegradationEstimator, side: int = 128, rounds: int = 30) -> float:
    """Median time of one image of side x side, on this machine with the threads it has."""
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        estimator(image)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[3:]))


def realsr_rows(estimators: dict[str, DegradationEstimator], folder: Path) -> list[dict[str, Any]]:
    """ROC area of RealSR's LR against its HR: reported only, for per pixel its LR is sharper than its HR."""
    rows = []
    for name, estimator in estimators.items():
        severity = {
            side: torch.cat(
                [
                    estimator(torch.from_numpy(load_image(path).copy()).permute(2, 0, 1)[None].float() / 255).severity
                    for path in list_images(str(folder / side)).paths
                ]
            )
            for side in ("LR", "HR")
        }
        value = area_under_curve(severity["HR"], severity["LR"])
        rows.append(
            {"estimator": name, "figure": "ROC area, RealSR HR against LR", "dimension": "severity", "value": value}
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", help="folder of held-out sharp photographs")
    parser.add_argument("--estimator", nargs="+", default=["frequency", "learned"], choices=("frequency", "learned"))
    parser.add_argument("--weights", help="weights of the learned estimator (default: the shipped ones)")
    parser.add_argument("--clip", help="folder or hub id of CLIP, to measure it too")
    parser.add_argument("--realsr", type=Path, help="folder with RealSR's LR and HR")
    parser.add_argument("--draws", type=int, default=4, help="values per photograph and set (default: 4)")
    parser.add_argument("--recipe", default="realesrgan")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    estimators = {
        name: build_estimator(name, **({"weights": options.weights} if name == "learned" and options.weights else {}))
        for name in options.estimator
    }
    if options.clip:
        estimators["clip"] = build_estimator("clip", model=options.clip)
    paths = list(list_images(options.photographs).paths)
    scores, truth = collect(estimators, paths, options.draws, options.recipe, options.seed)
    rows = []
    for name, estimator in estimators.items():
        rows += [{"estimator": name, **row} for row in summarise(estimator, scores[name], truth)]
        rows.append(
            {"estimator": name, "figure": "ms per 128 x 128 image", "dimension": "", "value": milliseconds(estimator)}
        )
    if options.realsr:
        rows += realsr_rows(estimators, options.realsr)
    for row in rows:
        interval = f"  [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
        print(f"{row['estimator']:10} {row['figure']:32} {row['dimension']:12} {row['value']:7.3f}{interval}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
