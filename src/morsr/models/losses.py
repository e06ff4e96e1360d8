"""Reconstruction losses on the decoded image, as a dictionary of named terms."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from morsr.errors import ConfigError, WeightsError
from morsr.functional.quality import rgb_to_y

PSNR_FLOOR = 1e-3
"""Added to the mean square error under the logarithm of the PSNR term, or flat crops would outweigh all others."""


class RestorationLoss(nn.Module):
    """Weighted sum of pixel and perceptual distances between SR and HR images.

    Args:
        l1: weight of the mean absolute error on images in [0, 1].
        l2: weight of the mean square error on images in [−1, 1] (OSEDiff: 1).
        charbonnier: weight of √(e² + 1e-6), a smooth L1, on images in [0, 1].
        psnr: weight of the mean over images of minus PSNR in dB on luma, so that every image counts alike however
            hard it is, as in the tables; an image above 30 dB counts less and less (`PSNR_FLOOR`).
        lpips: weight of LPIPS with VGG features (OSEDiff: 2); its weights are read from the local cache.

    Raises:
        ConfigError: a negative weight, or all of them zero.
        WeightsError: LPIPS is asked for and its weights cannot be had.

    Source: OSEDiff (arXiv 2406.08177) eq. 7; for the PSNR term HINet (arXiv 2105.06086) section 3.2.
    """

    def __init__(
        self, *, l1: float = 0.0, l2: float = 1.0, charbonnier: float = 0.0, psnr: float = 0.0, lpips: float = 0.0
    ) -> None:
        super().__init__()
        self.weights: Mapping[str, float] = {
            "l1": l1,
            "l2": l2,
            "charbonnier": charbonnier,
            "psnr": psnr,
            "lpips": lpips,
        }
        negative = {name: weight for name, weight in self.weights.items() if weight < 0}
        if negative or not any(self.weights.values()):
            raise ConfigError(f"loss weights: expected none negative and at least one positive, got {self.weights}")
        self.lpips = _build_lpips() if lpips else None

    def forward(self, sr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Return the unweighted terms that have a weight, and "total", their weighted sum.

        Args:
            sr: (B, 3, H, W), nominally in [0, 1]; not clamped, so that pixels outside keep their gradient.
            hr: (B, 3, H, W) in [0, 1].
        """
        sr = sr.float()
        terms = {}
        if self.weights["l1"]:
            terms["l1"] = F.l1_loss(sr, hr)
        if self.weights["l2"]:
            terms["l2"] = 4 * F.mse_loss(sr, hr)
        if self.weights["charbonnier"]:
            terms["charbonnier"] = ((sr - hr).square() + 1e-6).sqrt().mean()
        if self.weights["psnr"]:
            error = (rgb_to_y(sr) - rgb_to_y(hr)).square().mean((1, 2, 3))
            terms["psnr"] = 10 * (error + PSNR_FLOOR).log10().mean()
        if self.lpips is not None:
            terms["lpips"] = self.lpips(sr.clamp(0, 1), hr)
        total = sum((self.weights[name] * term for name, term in terms.items()), start=sr.new_zeros(()))
        return {**terms, "total": total}


def _build_lpips() -> nn.Module:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True)
    except Exception as error:  # torch.hub raises whatever the network library does
        raise WeightsError(
            f"LPIPS needs the VGG-16 weights of torchvision in the torch hub cache and they cannot be had ({error}); "
            "put them there, or set loss.lpips to 0"
        ) from error
    return metric.requires_grad_(False)
