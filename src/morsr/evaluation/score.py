"""Scoring: methods over pairs of images, and folders of outputs against references."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from morsr.errors import ConfigError, InputError
from morsr.evaluation.images import SUFFIXES, bicubic, image_size, read_rgb, side_by_side, to_tensor, to_uint8
from morsr.evaluation.tables import BenchmarkReport, ImageScore, PublishedRow
from morsr.files import printable
from morsr.models.metrics import MetricSet, build_metrics, metric_info
from morsr.models.scores import score_image

BICUBIC = "bicubic"
Method = Callable[[Tensor], Tensor]


class Pair(Protocol):
    """A low-resolution image and its reference, both (H, W, 3) uint8; `group` may name the photograph."""

    @property
    def stem(self) -> str: ...

    @property
    def lr(self) -> np.ndarray: ...

    @property
    def hr(self) -> np.ndarray: ...


@torch.no_grad()
def evaluate(
    methods: Mapping[str, Method],
    pairs: Iterable[Any],
    metrics: Sequence[str] = ("psnr", "ssim", "niqe"),
    *,
    out: str | Path | None = None,
    progress: bool = True,
    reference: str | None = None,
    published: Sequence[PublishedRow] = (),
    pictures: int = 4,
    device: torch.device | None = None,
) -> BenchmarkReport:
    """Score methods over pairs.

    Args:
        methods: name to method, in table order. A method gets the LR image as (1, 3, h, w) in [0, 1] on the CPU and
            returns (1, 3, H, W) of the reference's size; its output is rounded to 8 bits before it is scored.
        pairs: a `Pair` each, or something with a `load()` that reads one.
        metrics: names, see `morsr.models.metrics`.
        out: folder for scores.csv, scores.json, scores.md and side_by_side.png; None writes nothing.
        progress: show a progress bar.
        reference: the row that differences are taken to; None is "bicubic" when there, else the first method.
        published: rows of papers to print beside.
        pictures: images on the side-by-side sheet.
        device: where learned metrics run; None is the CPU.

    Raises:
        ConfigError: no methods, an unknown reference, or unknown metrics.
        InputError: no pairs, two pairs of one name, or an output of another size or that is not finite.
    """
    reference = reference or (BICUBIC if BICUBIC in methods else next(iter(methods), ""))
    if reference not in methods:
        raise ConfigError(f"evaluate: expected {reference or 'at least one'} among the methods, got {list(methods)}")
    built = build_metrics(metrics, device=device)
    rows: list[ImageScore] = []
    problems: list[str] = []
    sheet: list[dict[str, np.ndarray]] = []
    seen: set[str] = set()
    for item in tqdm(pairs, desc="evaluate", unit="image", disable=not progress):
        pair = item.load() if hasattr(item, "load") else item
        if pair.stem in seen:
            raise InputError(f"evaluate: expected one name per pair, got {pair.stem!r} twice")
        seen.add(pair.stem)
        lr, truth = to_tensor(pair.lr), to_tensor(pair.hr)
        line = {"LR bicubic": bicubic(pair.lr, *pair.hr.shape[:2])}
        for method, function in methods.items():
            started = time.perf_counter()
            raw = function(lr).float().cpu()
            seconds = time.perf_counter() - started
            if raw.shape != truth.shape or not raw.isfinite().all():
                raise InputError(
                    f"{method} on {pair.stem}: expected finite values of shape {tuple(truth.shape)}, "
                    f"got {tuple(raw.shape)}"
                )
            line[method] = to_uint8(raw)
            scores, failed = score_image(built.metrics, to_tensor(line[method]), truth)
            problems += [f"{method} on {pair.stem}: {text}" for text in failed]
            rows.append(ImageScore(pair.stem, method, scores, seconds, getattr(pair, "group", None)))
        if len(sheet) < pictures:
            line.pop(BICUBIC, None)  # it is the first picture already
            sheet.append({**line, "HR": pair.hr})
    if not rows:
        raise InputError("evaluate: expected at least one pair of images, got none")
    report = BenchmarkReport(
        rows=rows,
        metrics=[metric.info for metric in built.metrics.values()],
        absent=built.absent,
        reference=reference if len(methods) > 1 else None,
        problems=problems,
        published=published,
    )
    if out is not None:
        from PIL import Image

        report.save(out)
        if sheet:
            Image.fromarray(side_by_side(sheet)).save(Path(out) / "side_by_side.png")
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
    processes: int = 1,
    crop: bool = False,
    skip_problems: bool = False,
    progress: bool = True,
    device: torch.device | None = None,
    download: bool = True,
    published: Sequence[PublishedRow] = (),
) -> BenchmarkReport:
    """Score folders (or single files) of restored images.

    Args:
        outputs: method to folder or file. Folders are searched with their subfolders.
        hr: references of the same paths within their folder, but for suffixes; without them only metrics that need
            none are computed.
        lr: inputs of the same paths; adds the bicubic row.
        metrics: names, see `morsr.models.metrics`.
        out: folder for scores.csv, scores.json and scores.md.
        processes: worker processes. Metrics on an accelerator run in this process.
        crop: crop the images of a pair to their common top left part where sizes differ.
        skip_problems: score the rest when some files cannot be paired or read; the report lists them.
        progress: show a progress bar.
        device: where learned metrics run; None is the CPU.
        download: whether missing weights of metrics may be fetched.
        published: rows of papers to print beside.

    Raises:
        ConfigError: unknown metrics, none, no method, or a method called "bicubic" beside the bicubic row.
        InputError: folders that are missing or empty; without `skip_problems` anything that cannot be paired or
            compared (nothing is scored then); no metric that can be computed; no image that could be scored.
    """
    if not outputs or (lr is not None and BICUBIC in outputs):
        raise ConfigError(f"score: expected outputs by name, none called {BICUBIC!r} beside --lr, got {list(outputs)}")
    hr, lr = (Path(place) if place else None for place in (hr, lr))
    jobs, problems = _paired({method: Path(place) for method, place in outputs.items()}, hr, lr, crop)
    if problems and not skip_problems:
        raise InputError(
            f"{len(problems)} problems, nothing was scored (--skip-problems scores the rest):\n  " + _few(problems)
        )
    infos = {info.name: info for info in map(metric_info, metrics)}
    absent = {name: "needs references (--gt)" for name, info in infos.items() if hr is None and info.kind == "full"}
    names = [name for name in infos if name not in absent]
    built = build_metrics(names, device=device, download=download) if names or not absent else MetricSet({}, absent)
    absent |= built.absent
    if not built.metrics:
        raise InputError("score: no metric can be computed: " + "; ".join(f"{n} {why}" for n, why in absent.items()))
    work = partial(_score_job, metrics=built.metrics, crop=crop)
    results: list[tuple[dict[str, dict[str, float]], list[str]]] = []
    with tqdm(total=len(jobs), desc="score", unit="image", disable=not progress) as bar:
        for result in _mapped(work, jobs, names, processes if device is None else 1, crop, download):
            results.append(result)
            bar.update()
    problems += [text for _, failed in results for text in failed]
    methods = [*([BICUBIC] if lr is not None else []), *outputs]
    rows = [
        ImageScore(printable(job.stem), method, scores[method])
        for method in methods
        for job, (scores, _) in zip(jobs, results, strict=True)
        if method in scores
    ]
    if not rows:
        raise InputError("score: no image could be scored:\n  " + _few(problems))
    report = BenchmarkReport(
        rows=rows,
        metrics=[metric.info for metric in built.metrics.values()],
        absent=absent,
        reference=methods[0] if len(methods) > 1 else None,
        problems=[printable(text) for text in problems],
        incomplete=not all(scores for scores, _ in results),
        published=published,
    )
    if out is not None:
        report.save(out)
    return report


def _paired(outputs: Mapping[str, Path], hr: Path | None, lr: Path | None, crop: bool) -> tuple[list[_Job], list[str]]:
    """Files of one path within their folders, and one line for everything without a partner or of another size."""
    places = {**outputs, **{role: place for role, place in (("gt", hr), ("lr", lr)) if place is not None}}
    single = {place.is_file() for place in places.values()}
    if len(single) > 1:
        raise InputError(f"expected folders everywhere or files everywhere, got {', '.join(map(str, places.values()))}")
    problems: list[str] = []
    # Files that are named one by one belong together whatever they are called.
    stem = next(iter(outputs.values())).stem
    found = {r: {stem: p} if single == {True} else _images_of(p, r, problems) for r, p in places.items()}
    everything = sorted(set().union(*found.values()))
    for role, files in found.items():
        if absent := [name for name in everything if name not in files]:
            problems.append(f"{role}: nothing for {', '.join(absent)}")
    jobs = [
        _Job(
            name,
            {m: found[m][name] for m in outputs},
            found["gt"][name] if hr else None,
            found["lr"][name] if lr else None,
        )
        for name in everything
        if all(name in files for files in found.values())
    ]
    kept = []
    for job in jobs:
        found_here = _check(job, crop)
        problems += [f"{job.stem}: {text}" for text in found_here]
        kept += [] if found_here else [job]
    return kept, problems


def _check(job: _Job, crop: bool) -> list[str]:
    """Why an image cannot be scored, from the heads of its files."""
    try:
        sizes = {method: image_size(path) for method, path in job.outputs.items()}
        expected = image_size(job.hr) if job.hr else next(iter(sizes.values()))
        problems = [
            f"{method}: expected {expected[1]}x{expected[0]} px as the reference, got {size[1]}x{size[0]} (--crop)"
            for method, size in sizes.items()
            if job.hr and not crop and size != expected
        ]
        if job.lr and not problems:
            enlarged_size(image_size(job.lr), expected)
    except InputError as error:
        return [str(error)]
    return problems


def enlarged_size(lr: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The size to enlarge an input to, so that its pixels lie on those of an output.

    Args:
        lr: height and width of the input.
        size: height and width of the output, which may have been cropped to less than a whole multiple.

    Returns:
        The whole multiple of the input that the output was cropped from, by less than one input pixel; else `size`.

    Raises:
        InputError: no one scale of at least 1 leads from the input to the output within one input pixel.
    """
    factor = max(1, round(size[0] / lr[0]), round(size[1] / lr[1]))
    whole = (factor * lr[0], factor * lr[1])
    if all(0 <= large - side < factor for large, side in zip(whole, size, strict=True)):
        return whole
    low = max(1.0, *(side / (small + 1) for side, small in zip(size, lr, strict=True)))
    if any(side < small or (small > 1 and side / (small - 1) < low) for side, small in zip(size, lr, strict=True)):
        raise InputError(
            f"lr: expected an input that one scale enlarges to {size[1]}x{size[0]} px, got {lr[1]}x{lr[0]}; "
            "it may be turned, cropped, or in the wrong folder"
        )
    return size


def _images(job: _Job, crop: bool) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(method, output, reference) of one job, the bicubic row first."""
    truth = read_rgb(job.hr) if job.hr is not None else None
    outputs = {method: read_rgb(path) for method, path in job.outputs.items()}
    if job.lr is not None:
        lr = read_rgb(job.lr)
        height, width = (truth if truth is not None else next(iter(outputs.values()))).shape[:2]
        enlarged = bicubic(lr, *enlarged_size(lr.shape[:2], (height, width)))
        outputs = {BICUBIC: enlarged[:height, :width], **outputs}
    for method, image in outputs.items():
        if truth is None:
            yield method, image, None
            continue
        height, width = (min(a, b) for a, b in zip(image.shape[:2], truth.shape[:2], strict=True))
        yield method, image[:height, :width], truth[:height, :width]


def _few(problems: Sequence[str], limit: int = 12) -> str:
    """The first problems as lines, and the number of the others."""
    more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n  ".join([*problems[:limit], *more])


def _images_of(where: Path, role: str, problems: list[str]) -> dict[str, Path]:
    """Images of a folder and its subfolders by their path within it, without suffix ("sub/a")."""
    if not where.is_dir():
        raise InputError(f"{role}: {where} is neither a folder nor a file")
    found: dict[str, list[Path]] = {}
    for path in sorted(where.rglob("*")):
        inside = path.relative_to(where)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not any(p.startswith(".") for p in inside.parts):
            found.setdefault(inside.with_suffix("").as_posix(), []).append(path)
    if not found:
        raise InputError(f"{role}: {where} holds no image ({', '.join(sorted(SUFFIXES))})")
    problems += [f"{role}: one stem for {', '.join(p.name for p in many)}" for many in found.values() if len(many) > 1]
    return {stem: paths[0] for stem, paths in found.items() if len(paths) == 1}


def _mapped(
    work: Callable[[_Job], Any], jobs: Sequence[_Job], names: list[str], processes: int, crop: bool, download: bool
) -> Iterator[Any]:
    if min(processes, len(jobs)) <= 1:
        yield from map(work, jobs)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_worker, (names, crop, download)) as pool:
        yield from pool.map(_score_in_worker, jobs)


_WORKER: dict[str, Any] = {}


def _start_worker(names: list[str], crop: bool, download: bool) -> None:
    torch.set_num_threads(1)  # the processes share the cores already
    _WORKER.update(metrics=build_metrics(names, download=download).metrics, crop=crop)


def _score_in_worker(job: _Job) -> Any:
    return _score_job(job, **_WORKER)


def _score_job(job: _Job, metrics: Mapping[str, Any], crop: bool) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Scores of every method on one image, and what went wrong; no scores where a file cannot be decoded."""
    scores, problems = {}, []
    try:
        for method, sr, hr in _images(job, crop):
            scores[method], failed = score_image(metrics, to_tensor(sr), None if hr is None else to_tensor(hr))
            problems += [f"{method} on {job.stem}: {text}" for text in failed]
    except InputError as error:
        return {}, [f"{job.stem}: {error}"]
    return scores, problems
