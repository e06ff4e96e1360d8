"""What each metric is: where it comes from, its range and direction, and the weights it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlparse

_PYIQA_WEIGHTS = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/"
_TORCHVISION_WEIGHTS = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class Weight:
    """One file of weights: its place below torch.hub's folder, and where it comes from."""

    cached: str
    url: str

    def path(self, hub: Path) -> Path:
        """Where the file is looked for, given torch.hub's folder."""
        return hub / self.cached

    @property
    def host(self) -> str:
        """The server that it is downloaded from."""
        return urlparse(self.url).netloc


@dataclass(frozen=True)
class MetricInfo:
    """What a table must say of a metric.

    Attributes:
        name: how it is asked for and what the column is called.
        kind: "full" compares with a reference image, "none" needs none, "set" compares two sets of images,
            "other" is a column of a table that is no metric.
        lower_is_better: the direction.
        range: the range of values, as text; "~" marks the practical one.
        source: which definition and which code.
        weights: files that it downloads once; empty when it needs none.
        pyiqa: the name that pyiqa has for it, or empty when computed here.
        options: settings of pyiqa that differ from its defaults.
        complete: whether the first of the files holds the whole network. pyiqa fetches ImageNet weights for the
            backbone of such a network too, only to overwrite them; here they are left out.
    """

    name: str
    kind: str
    lower_is_better: bool
    range: str
    source: str
    weights: tuple[Weight, ...] = ()
    pyiqa: str = ""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    complete: bool = False

    @property
    def directed(self) -> bool:
        """Whether it is known which way is better."""
        return self.kind != "other"

    @property
    def arrow(self) -> str:
        """The direction as an arrow for table heads."""
        return "↓" if self.lower_is_better else "↑"

    @property
    def needs_weights(self) -> bool:
        """Whether files have to be downloaded before the first use."""
        return bool(self.weights)


def _pyiqa(name: str) -> Weight:
    return Weight(f"pyiqa/{name}", _PYIQA_WEIGHTS + name)


def _torchvision(name: str) -> Weight:
    return Weight(f"checkpoints/{name}", _TORCHVISION_WEIGHTS + name)


_CLIP_RN50 = Weight(
    "clip/RN50.pt",
    "https://openaipublic.azureedge.net/clip/models/"
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
)
_VGG16 = _torchvision("vgg16-397923af.pth")
_YCBCR = MappingProxyType({"test_y_channel": True, "color_space": "ycbcr"})

_ALL = (
    MetricInfo(
        "psnr", "full", False, "0 to 80 dB",
        "own; luma of BT.601 studio swing, unrounded, no border crop (pyiqa `psnr`, test_y_channel, ycbcr)",
    ),
    MetricInfo(
        "ssim", "full", False, "0 to 1",
        "own; luma of BT.601 studio swing in 8-bit levels, 11x11 Gaussian, valid region (pyiqa `ssim`, ycbcr)",
    ),
    MetricInfo(
        "niqe", "none", True, "0 to inf, photographs ~3 to 5",
        "own arithmetic with basicsr's pristine model, luma of BT.601 studio swing (basicsr `calculate_niqe`)",
    ),
    MetricInfo(
        "niqe-yiq", "none", True, "0 to inf, photographs ~3 to 5",
        "as niqe, on full-swing luma: the definition behind the NIQE columns made with pyiqa's defaults",
    ),
    MetricInfo(
        "lpips", "full", True, "0 to ~1", "pyiqa `lpips`, AlexNet, version 0.1",
        (_pyiqa("LPIPS_v0.1_alex-df73285e.pth"), _torchvision("alexnet-owt-7be5be79.pth")), "lpips",
    ),
    MetricInfo(
        "lpips-vgg", "full", True, "0 to ~1", "pyiqa `lpips-vgg`, VGG16, version 0.1",
        (_pyiqa("LPIPS_v0.1_vgg-a78928a0.pth"), _VGG16), "lpips-vgg",
    ),
    MetricInfo(
        "dists", "full", True, "0 to ~1", "pyiqa `dists`, VGG16",
        (_pyiqa("DISTS_weights-f5e65c96.pth"), _VGG16), "dists",
    ),
    MetricInfo(
        "musiq", "none", False, "~0 to 100", "pyiqa `musiq`, trained on KonIQ-10k",
        (_pyiqa("musiq_koniq_ckpt-e95806b9.pth"),), "musiq",
    ),
    MetricInfo(
        "maniqa", "none", False, "~0 to 1", "pyiqa `maniqa`, trained on KonIQ-10k (not comparable with maniqa-pipal)",
        (_pyiqa("ckpt_koniq10k.pt"),), "maniqa", complete=True,
    ),
    MetricInfo(
        "maniqa-pipal", "none", False, "~0 to 1", "pyiqa `maniqa-pipal`, trained on PIPAL (not comparable with maniqa)",
        (_pyiqa("MANIQA_PIPAL-ae6d356b.pth"),), "maniqa-pipal", complete=True,
    ),
    MetricInfo("clipiqa", "none", False, "0 to 1", "pyiqa `clipiqa`, CLIP RN50", (_CLIP_RN50,), "clipiqa"),
    MetricInfo(
        "topiq", "none", False, "~0 to 1", "pyiqa `topiq_nr`, ResNet-50, trained on KonIQ-10k",
        (_pyiqa("cfanet_nr_koniq_res50-9a73138b.pth"),), "topiq_nr", complete=True,
    ),
    MetricInfo(
        "tres", "none", False, "~0 to 100", "pyiqa `tres`, trained on KonIQ-10k",
        (_pyiqa("tres_koniq-f0502926.pth"),), "tres", complete=True,
    ),
    MetricInfo(
        "fid", "set", True, "0 to inf",
        "own distance on pyiqa's Inception features of whole images (clean-fid resizing); biased upward for few images",
        (_pyiqa("pt_inception-2015-12-05-6726825d.pth"),),
    ),
    MetricInfo("ms_ssim", "full", False, "0 to 1", "pyiqa `ms_ssim` on ycbcr luma", (), "ms_ssim", _YCBCR),
    MetricInfo("cw_ssim", "full", False, "0 to 1", "pyiqa `cw_ssim` on ycbcr luma", (), "cw_ssim", _YCBCR),
    MetricInfo("fsim", "full", False, "0 to 1", "pyiqa `fsim`, chromatic", (), "fsim"),
    MetricInfo("gmsd", "full", True, "0 to ~1", "pyiqa `gmsd` on luma", (), "gmsd"),
    MetricInfo("vif", "full", False, "0 to ~1", "pyiqa `vif`", (), "vif"),
    MetricInfo("vsi", "full", False, "0 to ~1", "pyiqa `vsi`", (), "vsi"),
    MetricInfo("nlpd", "full", True, "0 to ~1", "pyiqa `nlpd` on luma", (), "nlpd"),
    MetricInfo("mad", "full", True, "0 to inf", "pyiqa `mad`", (), "mad"),
    MetricInfo("piqe", "none", True, "0 to 100", "pyiqa `piqe`", (), "piqe"),
)  # fmt: skip

METRICS: Mapping[str, MetricInfo] = MappingProxyType({info.name: info for info in _ALL})

# The column names of published per-image tables.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "psnr_y": "psnr",
        "ssim_y": "ssim",
        "lpips_alex": "lpips",
        "lpips_vgg": "lpips-vgg",
        "maniqa_pipal": "maniqa-pipal",
        "maniqa-koniq": "maniqa",
        "topiq_nr": "topiq",
        "niqe_yiq": "niqe-yiq",
        "ms-ssim": "ms_ssim",
        "cw-ssim": "cw_ssim",
    }
)
