"""Degradation scores by a small network that was trained on the known parameters of our own degradations."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from morsr.errors import WeightsError
from morsr.estimators.base import DegradationEstimator
from morsr.estimators.statistics import Planes, dct_profile, image_statistics, image_traces
from morsr.estimators.views import mean_over_crops, pad_to_smallest
from morsr.files import expanded, save_tensors
from morsr.functional.precision import without_autocast

NAMES = ("blur", "noise", "jpeg", "resize", "overall")
LIMIT = 8.0  # standard deviations that standardised statistics are clipped to


def crop_statistics(crops: Tensor) -> Tensor:
    """What the network reads of crops (N, 3, h, w) in [0, 1], h and w at least 16: (N, S)."""
    with without_autocast(crops.device):
        planes = Planes.of(crops.float())
        return torch.cat([image_statistics(planes), dct_profile(planes), image_traces(planes)], dim=1)


class DegradationNet(nn.Module):
    """A small MLP from the statistics of a crop to the ranks of blur, noise, JPEG and resize, and to their mean.

    Args:
        hidden: width.
        dropout: on the first hidden units, in training only.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, *, hidden: int = 512, dropout: float = 0.3) -> None:
        super().__init__()
        count = crop_statistics(torch.full((1, 3, 16, 16), 0.5)).shape[1]
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("deviation", torch.ones(count))
        self.head = nn.Sequential(
            nn.Identity(),  # keeps the numbers of the layers in files
            nn.Linear(count, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2),
            nn.GELU(),
            nn.Linear(hidden // 2, len(NAMES)),
        )

    @torch.no_grad()
    def set_standardization(self, statistics: Tensor) -> None:
        """Take mean and deviation from the statistics (N, S) of some hundreds of crops."""
        self.mean.copy_(statistics.mean(dim=0))
        self.deviation.copy_(statistics.std(dim=0).clamp_min(1e-2))

    def forward(self, statistics: Tensor) -> Tensor:
        """Ranks (N, 5) in [0, 1], ordered as NAMES, of what `crop_statistics` gives (N, S)."""
        return self.head(((statistics - self.mean) / self.deviation).clamp(-LIMIT, LIMIT)).sigmoid()


def save_net(path: str | Path, net: DegradationNet) -> None:
    """Write a network as one safetensors file, with 16-bit weights."""
    # the statistics' mean and deviation reach beyond what 16 bits resolve
    state = {
        key: value.detach().cpu().to(torch.float16 if key.startswith("head") else torch.float32).contiguous()
        for key, value in net.state_dict().items()
    }
    save_tensors(path, state, {"kind": "morsr.degradation_net"})


def load_net(path: str | Path) -> DegradationNet:
    """Read what `save_net` wrote, in float32 and evaluation mode.

    Raises:
        WeightsError: no such file, cut short, or something else than a degradation network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(str(path))
        net = DegradationNet(hidden=len(state["head.1.bias"]))
        net.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise WeightsError(
            f"estimator weights {path}: cannot be used ({error}); train them by experiments/estimator/learned.yaml"
        ) from error
    return net.requires_grad_(False).eval()


class LearnedEstimator(DegradationEstimator):
    """Ranks of blur, noise, JPEG and resize among Real-ESRGAN's degradations, and their mean, by a trained network.

    At most 9 crops of 128 pixels at native resolution are scored and their outputs averaged.

    Args:
        weights: file of `save_net`; None takes the shipped one.

    Source: the idea of S3Diff's degradation network (2 scores there).
    """

    names = NAMES

    def __init__(self, weights: str | Path | None = None, *, worst: bool = False) -> None:
        super().__init__(worst=worst)
        shipped = resources.files("morsr").joinpath("weights", "tiny", "estimator.safetensors")
        self.weights = weights
        self.net = load_net(str(shipped) if weights is None else expanded(weights))

    def settings(self) -> dict[str, Any]:
        weights = {} if self.weights is None else {"weights": str(self.weights)}
        return {**weights, **super().settings()}

    def estimate(self, lr: Tensor) -> Tensor:
        return mean_over_crops(lambda crops: self.net(crop_statistics(crops)), pad_to_smallest(lr))
