"""Scoring: methods over pairs of images, and folders of outputs against references."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from morsr.errors import ConfigError, InputError
from morsr.evaluation.images import bicubic, read_rgb, to_tensor, to_uint8
from morsr.evaluation.tables import BenchmarkReport, ImageScore
from morsr.files import printable
from morsr.imaging import list_images
from morsr.imaging.sheet import side_by_side
from morsr.models.metrics import MetricSet, build_metrics, metric_info
from morsr.models.scores import score_image

BICUBIC = "bicubic"
PICTURES = 4  # photographs on the side-by-side sheet
Method = Callable[[Tensor], Tensor]


@torch.no_grad()
def evaluate(
    methods: Mapping[str, Method],
    pairs: Iterable[Any],
    metrics: Sequence[str] = ("psnr", "ssim", "niqe"),
    *,
    out: str | Path | None = None,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> BenchmarkReport:
    """Score methods over pairs; differences are taken to "bicubic" where it is there, else to the first method.

    Args:
        methods: name to method, in table order. A method gets the LR image as (1, 3, h, w) in [0, 1] on the CPU and
            returns (1, 3, H, W) of the reference's size; its output is rounded to 8 bits before it is scored.
        pairs: things with `stem`, `lr` and `hr`, both (H, W, 3) uint8, and perhaps `group`, the photograph; or things
            with a `load()` that reads one.
        metrics: names, see `morsr.models.metrics`.
        out: folder for scores.csv, scores.txt and side_by_side.png; None writes nothing.
        published: rows of papers to print beside, see `published_rows`.

    Raises:
        ConfigError: unknown metrics.
        InputError: no pairs, two pairs of one name, or an output of another size or that is not finite.
    """
    reference = BICUBIC if BICUBIC in methods else next(iter(methods))
    built = build_metrics(metrics)
    rows: list[ImageScore] = []
    stems: set[str] = set()
    problems: list[str] = []
    sheet: dict[str, dict[str, np.ndarray]] = {}
    for item in tqdm(pairs, desc="evaluate", unit="image", disable=None):
        pair = item.load() if hasattr(item, "load") else item
        if pair.stem in stems:
            raise InputError(f"evaluate: expected one name per pair, got {pair.stem!r} twice")
        stems.add(pair.stem)
        group = getattr(pair, "group", None)
        lr, truth = to_tensor(pair.lr), to_tensor(pair.hr)
        line = {"LR bicubic": bicubic(pair.lr, *pair.hr.shape[:2])}
        for method, function in methods.items():
            raw = function(lr).float().cpu()
            if raw.shape != truth.shape or not raw.isfinite().all():
                raise InputError(
                    f"{method} on {pair.stem}: expected finite values of shape {tuple(truth.shape)}, "
                    f"got {tuple(raw.shape)}"
                )
            line[method] = to_uint8(raw)
            scores, failed = score_image(built.metrics, to_tensor(line[method]), truth)
            problems += [f"{method} on {pair.stem}: {text}" for text in failed]
            rows.append(ImageScore(pair.stem, method, scores, group))
        if len(sheet) < PICTURES:
            line.pop(BICUBIC, None)  # it is the first picture already
            sheet.setdefault(group or pair.stem, {**line, "HR": pair.hr})
    if not rows:
        raise InputError("evaluate: expected at least one pair of images, got none")
    infos = [metric.info for metric in built.metrics.values()]
    report = BenchmarkReport(
        rows, infos, built.absent, reference if len(methods) > 1 else None, problems, published=published or {}
    )
    if out is not None:
        report.save(out)
        if sheet:
            from PIL import Image

            Image.fromarray(side_by_side(list(sheet.values()))).save(Path(out) / "side_by_side.png")
    return report


def bicubic_method(scale: int = 4) -> Method:
    """OpenCV's bicubic enlargement as a method of `evaluate`."""
    return lambda lr: to_tensor(bicubic(to_uint8(lr), scale * lr.shape[-2], scale * lr.shape[-1]))


@dataclass(frozen=True)
class _Job:
    """The files of one image: outputs by method, its reference and its input."""

    stem: str
    outputs: dict[str, Path]
    hr: Path | None
    lr: Path | None


def score_folders(
    outputs: Mapping[str, str | Path],
    hr: str | Path | None = None,
    lr: str | Path | None = None,
    metrics: Sequence[str] = ("psnr", "ssim", "niqe"),
    *,
    out: str | Path | None = None,
    device: torch.device | None = None,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> BenchmarkReport:
    """Score folders (or single files) of restored images; the report lists what cannot be paired, read or compared.

    Args:
        outputs: method to folder or file. Folders are searched with their subfolders.
        hr: references of the same paths within their folder, but for suffixes; without them only metrics that need
            none are computed.
        lr: inputs of the same paths; adds the bicubic row.
        metrics: names, see `morsr.models.metrics`.
        out: folder for scores.csv and scores.txt.
        device: where learned metrics run; None is the CPU.
        published: rows of papers to print beside, see `published_rows`.

    Raises:
        ConfigError: unknown metrics, none, no method, or a method called "bicubic" beside the bicubic row.
        InputError: folders that are missing or empty, no metric that can be computed, or no image that could be scored.
    """
    if not outputs or (lr is not None and BICUBIC in outputs):
        raise ConfigError(f"score: expected outputs by name, none called {BICUBIC!r} beside --lr, got {list(outputs)}")
    hr, lr = (Path(place) if place else None for place in (hr, lr))
    images, problems = _paired({method: Path(place) for method, place in outputs.items()}, hr, lr)
    infos = {info.name: info for info in map(metric_info, metrics)}
    absent = {name: "needs references (--gt)" for name, info in infos.items() if hr is None and info.kind == "full"}
    names = [name for name in infos if name not in absent]
    built = build_metrics(names, device=device) if names or not absent else MetricSet({}, absent)
    absent |= built.absent
    if not built.metrics:
        raise InputError("score: no metric can be computed: " + "; ".join(f"{n} {why}" for n, why in absent.items()))

    if out is not None:  # a folder that cannot be made is found before the work, not after it
        Path(out).mkdir(parents=True, exist_ok=True)

    def score(job: _Job) -> dict[str, tuple[dict[str, float], list[str]]] | str:
        try:
            return {
                method: score_image(built.metrics, to_tensor(sr), None if truth is None else to_tensor(truth))
                for method, sr, truth in _decoded(job)
            }
        except InputError as error:
            return str(error)

    scored = _mapped(score, images, at_once=device is None)
    methods, rows = [*([BICUBIC] if lr is not None else []), *outputs], []
    for job, found in zip(images, scored, strict=True):
        if isinstance(found, str):
            problems.append(f"{job.stem}: {found}")
            continue
        for method in methods:
            scores, failed = found[method]
            rows.append(ImageScore(printable(job.stem), method, scores))
            problems += [f"{method} on {job.stem}: {text}" for text in failed]
    if not rows:
        raise InputError(f"score: no image could be scored: {'; '.join(problems[:3])}")
    rows.sort(key=lambda row: methods.index(row.method))
    reference = methods[0] if len(methods) > 1 else None
    report = BenchmarkReport(
        rows, [metric.info for metric in built.metrics.values()], absent, reference, list(map(printable, problems)),
        published=published or {},
    )  # fmt: skip
    if out is not None:
        report.save(out)
    return report


def _paired(outputs: Mapping[str, Path], hr: Path | None, lr: Path | None) -> tuple[list[_Job], list[str]]:
    """Files of one path within their folders, and one line for everything without a partner."""
    places = {**outputs, **{role: place for role, place in (("gt", hr), ("lr", lr)) if place is not None}}
    if len({place.is_file() for place in places.values()}) > 1:
        raise InputError(f"expected folders everywhere or files everywhere, got {', '.join(map(str, places.values()))}")
    problems: list[str] = []
    found: dict[str, dict[str, Path]] = {}
    first = next(iter(outputs.values()))
    for role, place in places.items():
        files: dict[str, list[Path]] = {}
        for path in list_images(place):
            # Files that are named one by one belong together whatever they are called.
            stem = path.relative_to(place).with_suffix("").as_posix() if place.is_dir() else first.stem
            files.setdefault(stem, []).append(path)
        problems += [f"{role}: one stem for {', '.join(p.name for p in same)}" for same in files.values() if same[1:]]
        found[role] = {stem: same[0] for stem, same in files.items() if not same[1:]}
    every = sorted(set().union(*found.values()))
    for role, known in found.items():
        if lost := [stem for stem in every if stem not in known]:
            problems.append(f"{role}: nothing for {', '.join(lost)}")
    jobs = [
        _Job(stem, {m: found[m][stem] for m in outputs}, hr and found["gt"][stem], lr and found["lr"][stem])
        for stem in every
        if all(stem in known for known in found.values())
    ]
    return jobs, problems


def _decoded(job: _Job) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(method, output, reference) of one job; InputError for files that cannot be compared."""
    outputs = {method: read_rgb(path) for method, path in job.outputs.items()}
    truth = None if job.hr is None else read_rgb(job.hr)
    for method, image in outputs.items():
        if truth is not None and image.shape != truth.shape:
            (height, width), (high, wide) = truth.shape[:2], image.shape[:2]
            raise InputError(f"{method}: expected {width}x{height} px as the reference, got {wide}x{high}")
        yield method, image, truth
    if job.lr is not None:
        lr = read_rgb(job.lr)
        height, width = (next(iter(outputs.values())) if truth is None else truth).shape[:2]
        yield BICUBIC, bicubic(lr, *_fitting(lr.shape[:2], (height, width))), truth


def _fitting(lr: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """An output's height and width, if one scale of at least 1 leads there from the input within an input pixel."""
    least = max(1.0, *(side / (small + 1) for side, small in zip(size, lr, strict=True)))
    if any(side < max(small, least * (small - 1)) for side, small in zip(size, lr, strict=True)):
        raise InputError(
            f"lr: expected an input that one scale enlarges to {size[1]}x{size[0]} px, got {lr[1]}x{lr[0]}; "
            "it may be turned, cropped, or in the wrong folder"
        )
    return size


def _mapped(work: Callable[[_Job], Any], images: Sequence[_Job], *, at_once: bool) -> list[Any]:
    """Work on images in threads, one core each; torch, OpenCV and the decoders let other threads run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if at_once else threads)
    try:
        with ThreadPoolExecutor(threads if at_once else 1) as pool:
            return list(tqdm(pool.map(work, images), desc="score", unit="image", total=len(images), disable=None))
    finally:
        torch.set_num_threads(threads)
