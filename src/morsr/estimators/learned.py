"""Degradation scores by a small network that was trained on the known parameters of our own degradations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from morsr.errors import ConfigError, WeightsError
from morsr.estimators.base import DegradationEstimator
from morsr.estimators.statistics import dct_profile, image_statistics
from morsr.estimators.views import native_crops, pad_to_smallest

NAMES = ("blur", "noise", "jpeg", "resize", "overall")
FORMAT = 1
_MARK = "morsr.degradation_net"


class DegradationNet(nn.Module):
    """Crops at native resolution to one number in [0, 1] per name.

    Three strided convolutions, each read out as the log root mean square of its channels over the crop, beside fixed
    statistics (spectrum, blocks, noise, edges, DCT energies); a small MLP maps both to the ranks of blur, noise, JPEG
    and resize, and to their mean. The strides multiply to 8, the side of a JPEG block, and crops start on the grid.

    Args:
        width: channels of the three convolutions.
        hidden: width of the MLP.
        dropout: on its input and hidden units, in training only.
    """

    def __init__(self, *, width: Sequence[int] = (16, 32, 48), hidden: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        if len(width) != 3 or min(*width, hidden) < 1:
            raise ConfigError(
                f"width and hidden: expected three positive widths and one, got {list(width)} and {hidden}"
            )
        self.settings = {"width": list(width), "hidden": hidden, "dropout": dropout}
        first, second, third = width
        self.stages = nn.ModuleList(
            [
                nn.Conv2d(3, first, 5, stride=2, padding=2, padding_mode="replicate"),
                nn.Conv2d(first, second, 3, stride=2, padding=1, padding_mode="replicate"),
                nn.Conv2d(second, third, 3, stride=2, padding=1, padding_mode="replicate"),
            ]
        )
        with torch.no_grad():
            count = self._fixed(torch.full((1, 3, 16, 16), 0.5)).shape[1]
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("deviation", torch.ones(count))
        self.norm = nn.LayerNorm(sum(width))
        self.head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(sum(width) + count, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2),
            nn.GELU(),
            nn.Linear(hidden // 2, len(NAMES)),
        )

    @staticmethod
    @torch.no_grad()
    def _fixed(crops: Tensor) -> Tensor:
        return torch.cat([torch.stack(list(image_statistics(crops).values()), dim=1), dct_profile(crops)], dim=1)

    @torch.no_grad()
    def set_standardization(self, crops: Tensor) -> None:
        """Take mean and deviation of the fixed statistics from crops (N, 3, h, w), N of some hundreds."""
        fixed = self._fixed(crops)
        self.mean.copy_(fixed.mean(dim=0))
        self.deviation.copy_(fixed.std(dim=0).clamp_min(1e-2))

    def forward(self, crops: Tensor) -> Tensor:
        """Crops (N, 3, h, w) in [0, 1], h and w at least 16, to (N, 5) in [0, 1], ordered as NAMES."""
        hidden, pooled = crops - 0.5, []
        for stage in self.stages:
            hidden = nn.functional.gelu(stage(hidden))
            pooled.append((hidden.square().mean(dim=(2, 3)) + 1e-6).log())
        fixed = ((self._fixed(crops) - self.mean) / self.deviation).clamp(-4, 4)
        return self.head(torch.cat([self.norm(torch.cat(pooled, dim=1)), fixed], dim=1)).sigmoid()


def save_net(path: str | Path, net: DegradationNet, *, half: bool = True) -> None:
    """Write a network and its settings as one safetensors file, by default with 16-bit weights."""
    from safetensors.torch import save_file

    dtype = torch.float16 if half else torch.float32
    # the statistics' mean and deviation reach beyond what 16 bits resolve
    state = {
        key: value.detach().cpu().to(dtype if key.startswith(("stages", "head")) else torch.float32).contiguous()
        for key, value in net.state_dict().items()
    }
    metadata = {"kind": _MARK, "format": str(FORMAT), "names": json.dumps(NAMES), "settings": json.dumps(net.settings)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(path), metadata=metadata)


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
            f"estimator weights {path}: cannot be read ({error}); train them with experiments/estimator_learned.yaml, "
            'or choose estimator "frequency", which needs none'
        ) from error
    if metadata.get("kind") != _MARK or metadata.get("format") != str(FORMAT):
        raise WeightsError(
            f"estimator weights {path}: expected {_MARK} of format {FORMAT}, got {metadata or 'no metadata'}"
        )
    try:
        net = DegradationNet(**json.loads(metadata["settings"]))
        net.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"estimator weights {path}: do not fit their own settings ({error})") from error
    return net.requires_grad_(False).eval()


class LearnedEstimator(DegradationEstimator):
    """Ranks of blur, noise, JPEG and resize among Real-ESRGAN's degradations, and their mean, by a trained network.

    Dimensions: `blur`, `noise`, `jpeg`, `resize` and `overall`, which is the severity. At most 9 crops of 128 pixels at
    native resolution are scored and their outputs averaged.

    Args:
        weights: file of `save_net`; None takes the shipped one.

    Raises:
        WeightsError: weights that cannot be read.

    Source: the idea of S3Diff's degradation network (2 scores there).
    """

    names = NAMES

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        shipped = resources.files("morsr").joinpath("weights", "tiny", "estimator.safetensors")
        self.net = load_net(str(shipped) if weights is None else weights)

    def train(self, mode: bool = True) -> LearnedEstimator:
        """Dropout stays off, whatever the model around the estimator does."""
        super().train(mode)
        self.net.eval()
        return self

    def estimate(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        crops = native_crops(pad_to_smallest(lr))
        outputs = self.net(rearrange(crops, "b k c h w -> (b k) c h w"))
        scores = reduce(outputs, "(b k) d -> b d", "mean", b=len(lr))
        return scores, scores[:, NAMES.index("overall")]
