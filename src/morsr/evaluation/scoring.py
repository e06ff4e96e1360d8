"""Scoring folders of outputs: paired by name, in parallel, resumable."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import morsr
from morsr.errors import ConfigError, InputError
from morsr.evaluation.benchmark import set_scores
from morsr.evaluation.classical import bicubic
from morsr.evaluation.folders import Job, describe, enlarged_size, pair_up
from morsr.evaluation.images import SUFFIXES, read_rgb, to_tensor
from morsr.evaluation.published import PublishedRow
from morsr.evaluation.tables import PROTOCOL, BenchmarkReport, ImageScore
from morsr.files import printable
from morsr.models.jobs import unread_images
from morsr.models.metrics import Metric, MetricSet, build_metrics, metric_info
from morsr.models.scores import score_image

PROGRESS = "progress.jsonl"
JOURNAL = 2  # counts the changes of what the scores of the same files are
BICUBIC = "bicubic"


@dataclass
class _Result:
    """What came of one image.

    Attributes:
        scores: method to metric to score.
        features: metric over sets to method to (1, D), the reference under the empty name.
        problems: what went wrong.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


_Writer = Callable[[Job, _Result], None]


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
        lr: inputs of the same paths; adds the bicubic row, enlarged by the scale of the outputs, and cropped as they.
        metrics: names, see `morsr.models.metrics`.
        out: folder for scores.csv, scores.json, scores.md, and for progress.jsonl, from which a stopped run goes on;
            a result is used again only when its files, the metrics and the version are the same.
        processes: worker processes; with more than one the caller's main module must be importable. Metrics on an
            accelerator run in this process.
        crop: crop both images of a pair to their common top left part where sizes differ.
        skip_problems: score the rest when some files cannot be scored; the report lists them.
        progress: show a progress bar.
        device: where learned metrics run; None is the CPU.
        download: whether missing weights of metrics may be fetched.
        published: rows of papers to print beside.

    Raises:
        ConfigError: unknown metrics, none, no method, or a method called "bicubic" beside the bicubic row.
        InputError: folders that are missing or empty, or, unless `skip_problems`, anything that cannot be paired,
            compared or read; the message names every file. Or no metric that can be computed.
    """
    if not outputs:
        raise ConfigError("score: expected at least one folder of outputs, got none")
    if lr is not None and BICUBIC in outputs:
        raise ConfigError(f"score: a method is called {BICUBIC!r}, as the row made from lr; rename one or leave out lr")
    if processes < 1:
        raise ConfigError(f"score: expected at least one process, got {processes}")
    if not metrics:
        raise ConfigError("score: expected at least one metric, got none")
    infos = [metric_info(name) for name in metrics]
    jobs, problems = pair_up(
        {method: Path(place).expanduser() for method, place in outputs.items()},
        Path(hr).expanduser() if hr is not None else None,
        Path(lr).expanduser() if lr is not None else None,
        crop=crop,
    )
    if problems and not skip_problems:
        raise InputError(
            f"{len(problems)} problems, nothing was scored (--skip-problems scores the rest):\n{describe(problems)}"
        )
    if not jobs:
        raise InputError(f"no image is left to score:\n{describe(problems)}")
    compared = [info.name for info in infos if hr is None and info.kind != "none"]
    chosen = _build([info.name for info in infos if info.name not in compared], device, download)
    absent = {**chosen.absent, **dict.fromkeys(compared, "needs reference images (--gt)")}
    if not chosen.metrics:
        raise InputError(
            "none of the metrics can be computed: " + "; ".join(f"{name} {reason}" for name, reason in absent.items())
        )
    out = Path(out).expanduser() if out is not None else None
    done, failures = _score_all(
        jobs, chosen.metrics, out=out, processes=processes if device is None else 1,
        crop=crop, progress=progress, download=download,
    )  # fmt: skip
    problems += failures
    problems += _unread({**outputs, "gt": hr, "lr": lr})
    methods = [*([BICUBIC] if lr is not None else []), *outputs]
    rows = [
        ImageScore(printable(job.stem), method, done[job.stem].scores[method])
        for method in methods
        for job in jobs
        if job.stem in done
    ]
    if not rows:
        raise InputError(f"no image could be scored:\n{describe(problems)}")
    report = BenchmarkReport(
        rows=rows,
        metrics=[metric.info for metric in chosen.metrics.values()],
        absent=absent,
        reference=methods[0] if len(methods) > 1 else None,
        set_scores=_score_sets(chosen.metrics, [done[job.stem] for job in jobs if job.stem in done], methods),
        problems=[printable(text) for text in problems],
        incomplete=len(done) < len(jobs),
        published=published,
        notes=("Pairs of different sizes were cropped to their common top left part.",) if crop else (),
    )
    if out is not None:
        report.save(out)
    return report


def _unread(places: Mapping[str, str | Path | None]) -> list[str]:
    """One line for every folder with images whose endings are not read."""
    folders = {role: Path(place).expanduser() for role, place in places.items() if place is not None}
    found = {role: unread_images(place, SUFFIXES) for role, place in folders.items()}
    return [f"{role}: {text}" for role, text in found.items() if text]


def _build(names: list[str], device: torch.device | None, download: bool) -> MetricSet:
    return build_metrics(names, device=device, download=download) if names else MetricSet({}, {})


def _score_all(
    jobs: Sequence[Job],
    metrics: Mapping[str, Metric],
    *,
    out: Path | None,
    processes: int,
    crop: bool,
    progress: bool,
    download: bool,
) -> tuple[dict[str, _Result], list[str]]:
    """Score every job that an earlier run has not; results by stem, and what went wrong."""
    signature = {
        "protocol": PROTOCOL, "version": morsr.__version__, "journal": JOURNAL, "metrics": sorted(metrics), "crop": crop
    }  # fmt: skip
    done: dict[str, _Result] = {}
    problems: list[str] = []
    with _journal(out, signature) as (earlier, write):
        remaining = []
        for job in jobs:
            known = earlier.get(job.stem)
            if known is not None and known["files"] == _fingerprint(job):
                done[job.stem] = _decoded(known)
                problems += known["problems"]
            else:
                remaining.append(job)
        bar = tqdm(total=len(jobs), initial=len(done), desc="score", unit="image", disable=not progress)
        with bar:
            for job, result in _results(remaining, metrics, processes=processes, crop=crop, download=download):
                bar.update()
                if isinstance(result, str):
                    problems.append(result)
                    continue
                done[job.stem] = result
                problems += result.problems
                write(job, result)
    return done, problems


def _results(
    jobs: Sequence[Job], metrics: Mapping[str, Metric], *, processes: int, crop: bool, download: bool
) -> Iterator[tuple[Job, _Result | str]]:
    processes = min(processes, len(jobs))
    if processes <= 1:
        for job in jobs:
            yield job, _score_job(job, metrics, crop)
        return
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(list(metrics), crop, download)
    )
    try:
        futures = {pool.submit(_score_in_worker, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_WORKER: dict[str, Any] = {}


def _start_worker(names: list[str], crop: bool, download: bool) -> None:
    torch.set_num_threads(1)  # the processes share the cores already
    _WORKER.update(metrics=_build(names, None, download).metrics, crop=crop)


def _score_in_worker(job: Job) -> _Result | str:
    return _score_job(job, _WORKER["metrics"], _WORKER["crop"])


def _score_job(job: Job, metrics: Mapping[str, Metric], crop: bool) -> _Result | str:
    """Scores of every method on one image, or a text when a file turns out to be unreadable."""
    single = {name: metric for name, metric in metrics.items() if metric.info.kind != "set"}
    per_set = {name: metric for name, metric in metrics.items() if metric.info.kind == "set"}
    result = _Result(features={name: {} for name in per_set})
    try:
        for method, sr, hr in _images(job, crop):
            result.scores[method], failed = score_image(single, sr, hr)
            result.problems += [f"{method} on {job.stem}: {text}" for text in failed]
            for name, metric in per_set.items():
                if hr is not None and "" not in result.features[name]:
                    result.features[name][""] = metric(hr)
                result.features[name][method] = metric(sr)
    except InputError as error:
        return job.place(str(error))
    return result


def _images(job: Job, crop: bool) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(method, output, reference) of one job, the bicubic row first."""
    truth = read_rgb(job.hr) if job.hr is not None else None
    outputs = {method: read_rgb(path) for method, path in job.outputs.items()}
    if job.lr is not None:
        shown = next(iter(outputs.values())) if truth is None else truth
        enlarged = _enlarged(job.lr, [*outputs.values(), shown])
        outputs = {BICUBIC: enlarged[: shown.shape[0], : shown.shape[1]], **outputs}
    for method, image in outputs.items():
        if truth is None:
            yield method, to_tensor(image), None
            continue
        height, width = (min(a, b) for a, b in zip(image.shape[:2], truth.shape[:2], strict=True))
        if not crop and image.shape != truth.shape:
            raise InputError(f"{Path(job.stem).name}: {method} is {image.shape[:2]}, the reference {truth.shape[:2]}")
        yield method, to_tensor(image[:height, :width]), to_tensor(truth[:height, :width])


def _enlarged(path: Path, images: Sequence[np.ndarray]) -> np.ndarray:
    lr = read_rgb(path)
    size = enlarged_size(lr.shape[:2], [image.shape[:2] for image in images])
    if size is None:
        raise InputError(f"{path.name}: expected a smaller form of the outputs, got {lr.shape[1]}x{lr.shape[0]} px")
    return bicubic(lr, *size)


def _score_sets(
    metrics: Mapping[str, Metric], results: Sequence[_Result], methods: Sequence[str]
) -> dict[str, dict[str, float]]:
    per_set = {name: metric for name, metric in metrics.items() if metric.info.kind == "set"}
    features = {
        name: {
            method: [result.features[name][method] for result in results if method in result.features[name]]
            for method in ("", *methods)
        }
        for name in per_set
    }
    return set_scores(per_set, features, methods)


@contextmanager
def _journal(out: Path | None, signature: dict[str, Any]) -> Iterator[tuple[dict[str, Any], _Writer]]:
    """What an earlier run wrote, by stem, and a function that adds one result to it."""
    if out is None:
        yield {}, lambda job, result: None
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / PROGRESS
    earlier = _read_journal(path, signature)
    if not earlier:
        path.write_text(json.dumps(signature) + "\n", encoding="utf-8")
    elif not path.read_bytes().endswith(b"\n"):  # the last line was cut short
        with path.open("a", encoding="utf-8") as stream:
            stream.write("\n")
    with path.open("a", encoding="utf-8") as stream:
        yield earlier, lambda job, result: _write(stream, job, result)


def _read_journal(path: Path, signature: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the line that was being written when the run was stopped
            entries.append(None)
    if not entries or entries[0] != signature:
        return {}
    return {entry["stem"]: entry for entry in entries[1:] if entry is not None}


def _write(stream: TextIO, job: Job, result: _Result) -> None:
    entry: dict[str, Any] = {
        "stem": job.stem,
        "files": _fingerprint(job),
        "scores": {
            method: {name: value if math.isfinite(value) else None for name, value in found.items()}
            for method, found in result.scores.items()
        },
        "problems": result.problems,
    }
    if result.features:
        entry["features"] = {
            name: {
                method: base64.b64encode(values.float().numpy().tobytes()).decode() for method, values in found.items()
            }
            for name, found in result.features.items()
        }
    stream.write(json.dumps(entry) + "\n")
    stream.flush()


def _decoded(entry: Mapping[str, Any]) -> _Result:
    """The result that `_write` wrote."""
    scores = {
        method: {name: math.nan if value is None else value for name, value in found.items()}
        for method, found in entry["scores"].items()
    }
    features = {
        name: {
            method: torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy())[None].double()
            for method, text in found.items()
        }
        for name, found in entry.get("features", {}).items()
    }
    return _Result(scores, features, entry["problems"])


def _fingerprint(job: Job) -> list[list[Any]]:
    """The job's files and what each of them stood for."""
    files = [
        *job.outputs.items(),
        *((role, path) for role, path in (("", job.hr), (BICUBIC, job.lr)) if path is not None),
    ]
    return [[role, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for role, path in files]
