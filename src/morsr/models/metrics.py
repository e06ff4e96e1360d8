"""Image quality metrics by name, behind one face.

`psnr`, `ssim`, `niqe` and the Fréchet distance are computed here; the others are pyiqa's networks and formulas. A
metric whose weights cannot be had is reported as absent, with the files it wanted, and does not stop the rest.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morsr.errors import ConfigError, InputError, MissingDependencyError, MorsrError, WeightsError, check_images
from morsr.functional.niqe import niqe
from morsr.functional.quality import frechet_distance, psnr_y, ssim_y
from morsr.models.metric_info import ALIASES, METRICS, MetricInfo, Weight

__all__ = ["METRICS", "Metric", "MetricInfo", "MetricSet", "build_metric", "build_metrics", "metric_info"]

_TIMEOUT = 15.0  # seconds that a download may stay silent


@dataclass(frozen=True)
class Metric:
    """One metric, ready to use.

    Calling it scores a batch: `metric(sr, hr)` with images (B, 3, H, W) in [0, 1] gives (B,) float64 on the CPU;
    metrics without reference ignore `hr`. A metric over sets (`info.kind == "set"`) gives features (B, D) of one batch
    instead, and `distance(features, reference)` the score.
    """

    info: MetricInfo
    function: Callable[[Tensor, Tensor | None], Tensor] = field(repr=False)
    device: torch.device | None = None

    @torch.no_grad()
    def __call__(self, sr: Tensor, hr: Tensor | None = None) -> Tensor:
        """Score a batch.

        Raises:
            InputError: values that are not images in [0, 1], a missing reference, or two different sizes.
        """
        check_images(sr, name=f"{self.info.name}: sr")
        if self.info.kind == "full":
            if hr is None:
                raise InputError(f"{self.info.name} compares with a reference: expected hr, got None")
            if sr.shape != hr.shape:
                raise InputError(
                    f"{self.info.name}: expected images of one size, got {tuple(sr.shape)} and {tuple(hr.shape)}"
                )
            check_images(hr, name=f"{self.info.name}: hr")
        if self.device is not None:
            sr, hr = sr.to(self.device), None if hr is None else hr.to(self.device)
        result = self.function(sr, hr if self.info.kind == "full" else None).detach().double().cpu()
        return result if self.info.kind == "set" else result.reshape(-1)

    def distance(self, features: Tensor, reference: Tensor) -> float:
        """Fréchet distance between two sets of features (N, D); only for metrics over sets."""
        if self.info.kind != "set":
            raise ConfigError(f"{self.info.name} scores single images; only a metric over sets has a distance")
        return frechet_distance(features, reference).item()


@dataclass(frozen=True)
class MetricSet:
    """The metrics that could be built, in the order asked for, and why the others could not."""

    metrics: dict[str, Metric]
    absent: dict[str, str]


def metric_info(name: str) -> MetricInfo:
    """What a metric is: source, range, direction, weights.

    Args:
        name: a name of `METRICS`, one of the column names of published tables (`psnr_y`, `maniqa_pipal`), or any other
            name that pyiqa knows.

    Raises:
        ConfigError: nobody knows the name; the message lists near ones.
    """
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key in METRICS:
        return METRICS[key]
    with contextlib.suppress(MissingDependencyError):
        configs = _pyiqa_configs()
        if key in configs:
            entry = configs[key]
            return MetricInfo(
                name=key,
                kind="full" if entry["metric_mode"] == "FR" else "none",
                lower_is_better=entry.get("lower_better", False),
                range=entry.get("score_range", "not stated"),
                source=f"pyiqa `{key}` with its default settings",
                pyiqa=key,
            )
    near = difflib.get_close_matches(key, METRICS, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"unknown metric {name!r}{hint} Known: {', '.join(METRICS)}, and every other name of pyiqa")


def build_metric(name: str, *, device: torch.device | None = None, download: bool = True) -> Metric:
    """Make one metric ready.

    Args:
        name: see `metric_info`.
        device: where a learned metric runs; None is the CPU. The own metrics follow their input.
        download: whether weights that are not in the cache may be fetched. Never when HF_HUB_OFFLINE is set.

    Raises:
        ConfigError: unknown name.
        WeightsError: weights are missing and cannot be had; the message names the files and where to put them.
        MissingDependencyError: the package behind it is not installed.
    """
    info = metric_info(name)
    if info.name == "psnr":
        return Metric(info, lambda sr, hr: psnr_y(sr, _given(hr)))
    if info.name == "ssim":
        return Metric(info, lambda sr, hr: ssim_y(sr, _given(hr)))
    if info.name in ("niqe", "niqe-yiq"):
        mean, covariance = _niqe_parameters()
        luma = "yiq" if info.name == "niqe-yiq" else "ycbcr"
        return Metric(info, lambda sr, _: niqe(sr.cpu(), mean, covariance, luma=luma))
    _require_weights(info, download=download)
    device = device or torch.device("cpu")
    network = _inception(info) if info.kind == "set" else _pyiqa_network(info)
    network = network.to(device)
    if info.kind == "set":
        return Metric(
            info, lambda sr, _: network(_inception_input(sr).to(sr.device), False, False)[0].flatten(1), device
        )
    return Metric(info, lambda sr, hr: network(sr.float(), None if hr is None else hr.float()), device)


def build_metrics(names: Iterable[str], *, device: torch.device | None = None, download: bool = True) -> MetricSet:
    """Make metrics ready; one that needs what is not there is noted in `absent` and the rest go on.

    Raises:
        ConfigError: a name that nobody knows, a name given twice, or no name at all.
    """
    infos = [metric_info(name) for name in names]
    repeated = sorted({info.name for info in infos if infos.count(info) > 1})
    if repeated or not infos:
        raise ConfigError(f"expected at least one metric, each once, got {[info.name for info in infos]}")
    metrics: dict[str, Metric] = {}
    absent: dict[str, str] = {}
    for info in infos:
        try:
            metrics[info.name] = build_metric(info.name, device=device, download=download)
        except MorsrError as error:
            absent[info.name] = str(error)
    return MetricSet(metrics, absent)


def missing_weights(info: MetricInfo) -> list[Weight]:
    """The files of a metric that are not in the cache of torch.hub (metrics whose files are not listed: none)."""
    return [weight for weight in info.weights if not weight.path(Path(torch.hub.get_dir())).is_file()]


def _given(hr: Tensor | None) -> Tensor:
    if hr is None:
        raise InputError("expected a reference image, got None")
    return hr


@lru_cache(maxsize=1)
def _niqe_parameters() -> tuple[Tensor, Tensor]:
    """The pristine model that basicsr carries in its package."""
    # Only the file is wanted: importing basicsr would take seconds and load half of its training code.
    found = importlib.util.find_spec("basicsr")
    if found is None or found.origin is None:
        raise MissingDependencyError("niqe needs basicsr's pristine model: pip install 'morsr[reference]'")
    with np.load(Path(found.origin).parent / "metrics" / "niqe_pris_params.npz", allow_pickle=False) as archive:
        return torch.from_numpy(archive["mu_pris_param"]), torch.from_numpy(archive["cov_pris_param"])


def _require_weights(info: MetricInfo, *, download: bool) -> None:
    missing = missing_weights(info)
    if not missing:
        return
    hub = Path(torch.hub.get_dir())
    wanted = ", ".join(str(weight.path(hub)) for weight in missing)
    if not download or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise WeightsError(f"{info.name} needs {wanted}; downloads are switched off")
    for host in sorted({weight.host for weight in missing}):
        if not _reachable(host):
            sources = ", ".join(weight.url for weight in missing)
            raise WeightsError(f"{info.name} needs {wanted}; {host} cannot be reached: fetch {sources} elsewhere")


@cache
def _reachable(host: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(f"https://{host}/", method="HEAD"), timeout=_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only that it has no such page
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _quiet_and_safe() -> Iterator[None]:
    """Loading by pyiqa: nothing printed, no silent download that hangs, and no pickled code in a checkpoint."""
    timeout, forced = socket.getdefaulttimeout(), os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    socket.setdefaulttimeout(_TIMEOUT)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)
        if forced is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced


def _pyiqa_configs() -> dict:
    try:
        from pyiqa.default_model_configs import DEFAULT_CONFIGS
    except ImportError as error:
        raise MissingDependencyError(f"pyiqa cannot be imported ({error}): pip install 'morsr[metrics]'") from error
    return DEFAULT_CONFIGS


def _pyiqa_network(info: MetricInfo) -> torch.nn.Module:
    _pyiqa_configs()
    from pyiqa.models.inference_model import InferenceModel

    with _loading(info), _without_backbone_weights() if info.complete else contextlib.nullcontext():
        network = InferenceModel(info.pyiqa, device=torch.device("cpu"), **dict(info.options))
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def _without_backbone_weights() -> Iterator[None]:
    """Build backbones of timm and torchvision without fetching weights that the metric's own file overwrites.

    The file is loaded strictly, so a tensor that it does not hold is an error and never an initial value.
    """
    import timm
    import torchvision

    makers = ((timm, "create_model", "pretrained", False), (torchvision.models, "resnet50", "weights", None))
    originals = [getattr(place, name) for place, name, *_ in makers]

    def bare(make: Callable[..., torch.nn.Module], option: str, nothing: Any) -> Callable[..., torch.nn.Module]:
        return lambda *arguments, **options: make(*arguments, **{**options, option: nothing})

    try:
        for (place, name, option, nothing), original in zip(makers, originals, strict=True):
            setattr(place, name, bare(original, option, nothing))
        yield
    finally:
        for (place, name, *_), original in zip(makers, originals, strict=True):
            setattr(place, name, original)


def _inception(info: MetricInfo) -> torch.nn.Module:
    _pyiqa_configs()
    from pyiqa.archs.inception import InceptionV3

    with _loading(info):
        network = InceptionV3(output_blocks=[InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    return network.eval().requires_grad_(False)


@contextlib.contextmanager
def _loading(info: MetricInfo) -> Iterator[None]:
    """Turn whatever pyiqa raises while it builds a metric into one error that names the metric and its files."""
    try:
        with _quiet_and_safe():
            yield
    except Exception as error:
        hub = Path(torch.hub.get_dir())
        files = ", ".join(str(weight.path(hub)) for weight in info.weights) or "files that pyiqa does not list"
        raise WeightsError(f"{info.name} could not be loaded from {files}: {error}") from error


def _inception_input(images: Tensor) -> Tensor:
    """299x299 by PIL's antialiased bicubic on float channels, range [-1, 1), as clean-fid does it."""
    from PIL import Image

    batch = []
    for image in images.mul(255).float().cpu().numpy():
        channels = [Image.fromarray(channel).resize((299, 299), Image.Resampling.BICUBIC) for channel in image]
        batch.append(np.stack([np.asarray(channel) for channel in channels]).clip(0, 255))
    return (torch.from_numpy(np.stack(batch)) - 128) / 128
