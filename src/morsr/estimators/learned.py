"""Degradation scores by a small network that was trained on the known parameters of our own degradations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from morsr.errors import ConfigError, WeightsError
from morsr.estimators.base import DegradationEstimator
from morsr.estimators.statistics import dct_profile, image_statistics, image_traces
from morsr.estimators.views import native_crops, pad_to_smallest
from morsr.files import save_tensors

NAMES = ("blur", "noise", "jpeg", "resize", "overall")
FORMAT = 1
_MARK = "morsr.degradation_net"


class DegradationNet(nn.Module):
    """Crops at native resolution to one number in [0, 1] per name.

    Fixed statistics (spectrum, blocks, noise, edges, DCT energies, traces of resizing) go through a small MLP to the
    ranks of blur, noise, JPEG and resize, and to their mean. Beside them, if asked for, three strided convolutions,
    each read out as the log root mean square of its channels over the crop; their strides multiply to 8, the side of
    a JPEG block, and crops start on the grid.

    Args:
        width: channels of the three convolutions; empty leaves them out.
        hidden: width of the MLP.
        dropout: on its first hidden units, in training only.
        traces: also read `image_traces`.
        limit: standardised statistics are clipped to this many deviations.

    Raises:
        ConfigError: another number of convolutions than three or none, or a width below 1.
    """

    def __init__(
        self,
        *,
        width: Sequence[int] = (),
        hidden: int = 512,
        dropout: float = 0.3,
        traces: bool = True,
        limit: float = 8.0,
    ) -> None:
        super().__init__()
        if len(width) not in (0, 3) or min(*width, hidden, hidden) < 1:
            raise ConfigError(
                f"width and hidden: expected three positive widths or none, and one, got {list(width)} and {hidden}"
            )
        self.settings = {"width": list(width), "hidden": hidden, "dropout": dropout, "traces": traces, "limit": limit}
        self.traces, self.limit = traces, limit
        kernels = ((3, 5), *((channels, 3) for channels in width[:-1]))
        self.stages = nn.ModuleList(
            nn.Conv2d(before, after, side, stride=2, padding=side // 2, padding_mode="replicate")
            for (before, side), after in zip(kernels, width, strict=False)
        )
        count = self.fixed(torch.full((1, 3, 16, 16), 0.5)).shape[1]
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("deviation", torch.ones(count))
        self.norm = nn.LayerNorm(sum(width)) if width else None
        self.head = nn.Sequential(
            nn.Identity(),  # keeps the numbers of the layers in files
            nn.Linear(sum(width) + count, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2),
            nn.GELU(),
            nn.Linear(hidden // 2, len(NAMES)),
        )

    @torch.no_grad()
    def fixed(self, crops: Tensor) -> Tensor:
        """The statistics of crops (N, 3, h, w) in [0, 1] that no training changes: (N, S)."""
        parts = [torch.stack(list(image_statistics(crops).values()), dim=1), dct_profile(crops)]
        return torch.cat([*parts, image_traces(crops)] if self.traces else parts, dim=1)

    @torch.no_grad()
    def set_standardization(self, fixed: Tensor) -> None:
        """Take mean and deviation from the fixed statistics (N, S) of some hundreds of crops."""
        self.mean.copy_(fixed.mean(dim=0))
        self.deviation.copy_(fixed.std(dim=0).clamp_min(1e-2))

    def forward(self, crops: Tensor, fixed: Tensor | None = None) -> Tensor:
        """Crops (N, 3, h, w) in [0, 1], h and w at least 16, to (N, 5) in [0, 1], ordered as NAMES.

        `fixed` (N, S) are their statistics where they are known already; without convolutions the crops are then not
        looked at.
        """
        fixed = self.fixed(crops) if fixed is None else fixed
        parts = [((fixed - self.mean) / self.deviation).clamp(-self.limit, self.limit)]
        if self.norm is not None:
            hidden, pooled = crops - 0.5, []
            for stage in self.stages:
                hidden = nn.functional.gelu(stage(hidden))
                pooled.append((hidden.square().mean(dim=(2, 3)) + 1e-6).log())
            parts.insert(0, self.norm(torch.cat(pooled, dim=1)))
        return self.head(torch.cat(parts, dim=1)).sigmoid()


def save_net(path: str | Path, net: DegradationNet, *, half: bool = True) -> None:
    """Write a network and its settings as one safetensors file, by default with 16-bit weights."""
    dtype = torch.float16 if half else torch.float32
    # the statistics' mean and deviation reach beyond what 16 bits resolve
    state = {
        key: value.detach().cpu().to(dtype if key.startswith(("stages", "head")) else torch.float32).contiguous()
        for key, value in net.state_dict().items()
    }
    metadata = {"kind": _MARK, "format": str(FORMAT), "names": json.dumps(NAMES), "settings": json.dumps(net.settings)}
    save_tensors(path, state, metadata)


def load_net(path: str | Path) -> DegradationNet:
    """Read what `save_net` wrote, in float32 and evaluation mode.

    Raises:
        WeightsError: no such file, cut short, or something else than a degradation network.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            keys = file.keys()  # the handle itself cannot be iterated over
            state = {key: file.get_tensor(key).float() for key in keys}
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"estimator weights {path}: cannot be read ({error}); train them with experiments/estimator/learned.yaml, "
            'or choose estimator "frequency", which needs none'
        ) from error
    if metadata.get("kind") != _MARK or metadata.get("format") != str(FORMAT):
        raise WeightsError(
            f"estimator weights {path}: expected {_MARK} of format {FORMAT}, got {metadata or 'no metadata'}"
        )
    try:
        # what earlier files do not name: they had no traces, and a limit of 4
        net = DegradationNet(**{"traces": False, "limit": 4.0, **json.loads(metadata["settings"])})
        net.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"estimator weights {path}: do not fit their own settings ({error})") from error
    return net.requires_grad_(False).eval()


class LearnedEstimator(DegradationEstimator):
    """Ranks of blur, noise, JPEG and resize among Real-ESRGAN's degradations, and their mean, by a trained network.

    Dimensions: `blur`, `noise`, `jpeg`, `resize` and `overall`. At most 9 crops of 128 pixels at
    native resolution are scored and their outputs averaged.

    Args:
        weights: file of `save_net`; None takes the shipped one.

    Raises:
        WeightsError: weights that cannot be read.

    Source: the idea of S3Diff's degradation network (2 scores there).
    """

    names = NAMES
    takes_whole_numbers = True

    def __init__(self, weights: str | Path | None = None, *, worst: bool = False) -> None:
        super().__init__(worst=worst)
        self.weights = weights
        shipped = resources.files("morsr").joinpath("weights", "tiny", "estimator.safetensors")
        self.net = load_net(str(shipped) if weights is None else weights)

    def settings(self) -> dict[str, Any]:
        weights = {} if self.weights is None else {"weights": str(self.weights)}
        return {**weights, **super().settings()}

    def estimate(self, lr: Tensor) -> Tensor:
        crops = native_crops(pad_to_smallest(lr))
        outputs = self.net(rearrange(crops, "b k c h w -> (b k) c h w"))
        return reduce(outputs, "(b k) d -> b d", "mean", b=len(lr))
