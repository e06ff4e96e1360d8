"""Reading 8-bit images for scoring, and the bicubic row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from morsr import imaging
from morsr.errors import InputError


def read_rgb(path: Path) -> np.ndarray:
    """Decode an 8-bit gray or RGB file to (H, W, 3) uint8, gray repeated, EXIF rotation applied.

    Raises:
        InputError: the file cannot be decoded, or holds other than 8 bits, alpha, or several pages.
    """
    picture = imaging.read(path)
    if picture.samples.dtype != np.uint8 or picture.alpha is not None:
        got = "transparency" if picture.alpha is not None else f"{picture.samples.dtype} samples"
        raise InputError(f"{path.name}: expected 8-bit gray or RGB, got {got}")
    return picture.rgb8


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).float().div(255)


def to_uint8(image: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] to (H, W, 3) uint8, clamped and rounded."""
    return image[0].detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge (h, w, 3) uint8 by OpenCV's bicubic interpolation: the row that every table carries."""
    import cv2

    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
