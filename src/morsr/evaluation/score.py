"""Scoring: methods over pairs of images, and folders of outputs against references."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from morsr.imaging.figures import side_by_side
from morsr.models.metrics import MetricSet, build_metrics, metric_info
from morsr.models.scores import score_image

BICUBIC = "bicubic"
PICTURES = 4  # photographs on the side-by-side sheet
Method = Callable[[Tensor], Tensor]
Outputs = tuple[str, str | None, dict[str, np.ndarray], np.ndarray | None]
"""Name and photograph of one image, its outputs by method and its reference, all of them (H, W, 3) uint8."""


@torch.no_grad()
def evaluate(
    methods: Mapping[str, Method],
    pairs: Iterable[Any],
    metrics: Sequence[str] = ("psnr", "ssim", "niqe"),
    *,
    out: str | Path | None = None,
) -> BenchmarkReport:
    """Score methods over pairs; differences are taken to "bicubic" where it is there, else to the first method.

    Args:
        methods: name to method, in table order. A method gets the LR image as (1, 3, h, w) in [0, 1] on the CPU and
            returns (1, 3, H, W) of the reference's size; its output is rounded to 8 bits before it is scored.
        pairs: things with `stem`, `lr` and `hr`, both (H, W, 3) uint8, and perhaps `group`, the photograph; or things
            with a `load()` that reads one.
        metrics: names, see `morsr.models.metrics`.
        out: folder for scores.csv, scores.txt and side_by_side.png; None writes nothing.

    Raises:
        ConfigError: unknown metrics.
        InputError: no pairs, two pairs of one name, or an output of another size or that is not finite.
    """
    stems: set[str] = set()
    sheet: dict[str, dict[str, np.ndarray]] = {}

    def restored() -> Iterator[Outputs]:
        for item in pairs:
            pair = item.load() if hasattr(item, "load") else item
            if pair.stem in stems:
                raise InputError(f"evaluate: expected one name per pair, got {pair.stem!r} twice")
            stems.add(pair.stem)
            group, shape, images = getattr(pair, "group", None), (1, 3, *pair.hr.shape[:2]), {}
            for method, function in methods.items():
                raw = function(to_tensor(pair.lr)).float().cpu()
                if raw.shape != shape or not raw.isfinite().all():
                    raise InputError(
                        f"{method} on {pair.stem}: expected finite values of shape {shape}, got {tuple(raw.shape)}"
                    )
                images[method] = to_uint8(raw)
            if len(sheet) < PICTURES:
                shown = {"LR bicubic": bicubic(pair.lr, *pair.hr.shape[:2]), **images, "HR": pair.hr}
                shown.pop(BICUBIC, None)  # it is the first picture already
                sheet.setdefault(group or pair.stem, shown)
            yield pair.stem, group, images, pair.hr

    report = _scored(restored(), build_metrics(metrics), [], out)
    if out is not None:
        from PIL import Image

        Image.fromarray(side_by_side(list(sheet.values()))).save(Path(out) / "side_by_side.png")
    return report


def bicubic_method(scale: int = 4) -> Method:
    """OpenCV's bicubic enlargement as a method of `evaluate`."""
    return lambda lr: to_tensor(bicubic(to_uint8(lr), scale * lr.shape[-2], scale * lr.shape[-1]))


def score_folders(
    outputs: Mapping[str, str | Path],
    hr: str | Path | None = None,
    lr: str | Path | None = None,
    metrics: Sequence[str] = ("psnr", "ssim", "niqe"),
    *,
    out: str | Path | None = None,
    device: torch.device | None = None,
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

    Raises:
        ConfigError: unknown metrics, none, no method, or a method called "bicubic" beside the bicubic row.
        InputError: folders that are missing or empty, no metric that can be computed, or no image that could be scored.
    """
    if not outputs or (lr is not None and BICUBIC in outputs):
        raise ConfigError(f"score: expected outputs by name, none called {BICUBIC!r} beside --lr, got {list(outputs)}")
    places = {**outputs, **{role: place for role, place in (("--gt", hr), ("--lr", lr)) if place}}
    complete, problems = _paired({role: Path(place) for role, place in places.items()})
    infos = {info.name: info for info in map(metric_info, metrics)}
    absent = {name: "needs references (--gt)" for name, info in infos.items() if hr is None and info.kind == "full"}
    names = [name for name in infos if name not in absent]
    built = build_metrics(names, device=device) if names or not absent else MetricSet({}, {})
    absent |= built.absent
    if not built.metrics:
        raise InputError("score: no metric can be computed: " + "; ".join(f"{n} {why}" for n, why in absent.items()))
    if out is not None:  # a folder that cannot be made is found before the work, not after it
        Path(out).mkdir(parents=True, exist_ok=True)

    def read() -> Iterator[Outputs]:
        for stem, files in complete.items():
            try:
                yield stem, None, *_comparable({role: read_rgb(path) for role, path in files.items()})
            except InputError as error:
                problems.append(f"{stem}: {error}")

    return _scored(read(), MetricSet(built.metrics, absent), problems, out)


def _scored(
    images: Iterable[Outputs], built: MetricSet, problems: list[str], out: str | Path | None
) -> BenchmarkReport:
    """Score all outputs and write the tables; `problems` may grow while images are read."""
    rows: list[ImageScore] = []
    for name, group, outputs, truth in tqdm(images, desc="score", unit="image", disable=None):
        for method, image in outputs.items():
            scores, failed = score_image(built.metrics, to_tensor(image), None if truth is None else to_tensor(truth))
            problems += [f"{method} on {name}: {text}" for text in failed]
            rows.append(ImageScore(printable(name), method, scores, group))
    if not rows:
        raise InputError(f"score: expected at least one image, got none; {'; '.join(problems[:3])}")
    methods = list(dict.fromkeys(row.method for row in rows))
    report = BenchmarkReport(
        rows,
        list(built.metrics.values()),
        absent=built.absent,
        reference=min(methods, key=lambda name: name != BICUBIC) if len(methods) > 1 else None,
        problems=list(map(printable, problems)),
    )
    if out is not None:
        report.save(out)
    return report


def _paired(places: Mapping[str, Path]) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Files by name and role where each role has one, by their path within its folder; one line for everything else."""
    if len({place.is_file() for place in places.values()}) > 1:
        raise InputError(f"expected folders everywhere or files everywhere, got {', '.join(map(str, places.values()))}")
    found: dict[str, dict[str, list[Path]]] = {}
    first = next(iter(places.values()))
    for role, place in places.items():
        for path in list_images(place):
            # Files that are named one by one belong together whatever they are called.
            stem = path.relative_to(place).with_suffix("").as_posix() if place.is_dir() else first.stem
            found.setdefault(stem, {}).setdefault(role, []).append(path)
    complete, problems = {}, []
    for stem, files in sorted(found.items()):
        counts = {role: len(files.get(role, ())) for role in places}
        odd = [f"{role}: expected one file for {stem}, got {count}" for role, count in counts.items() if count != 1]
        problems += odd
        if not odd:
            complete[stem] = {role: paths[0] for role, paths in files.items()}
    return complete, problems


def _comparable(pictures: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Outputs by method, with bicubic first where there is an input, and the reference.

    Raises:
        InputError: an output or an input of another size.
    """
    truth, lr = pictures.pop("--gt", None), pictures.pop("--lr", None)
    for method, image in pictures.items():
        if truth is not None and image.shape != truth.shape:
            (height, width), (high, wide) = truth.shape[:2], image.shape[:2]
            raise InputError(f"{method}: expected {width}x{height} px as the reference, got {wide}x{high}")
    if lr is None:
        return pictures, truth
    height, width = (next(iter(pictures.values())) if truth is None else truth).shape[:2]
    h, w = lr.shape[:2]
    least = max(1.0, height / (h + 1), width / (w + 1))
    if height < max(h, least * (h - 1)) or width < max(w, least * (w - 1)):  # within an input pixel
        raise InputError(
            f"lr: expected an input that one scale enlarges to {width}x{height} px, got {w}x{h}; "
            "it may be turned, cropped, or in the wrong folder"
        )
    return {BICUBIC: bicubic(lr, height, width), **pictures}, truth
