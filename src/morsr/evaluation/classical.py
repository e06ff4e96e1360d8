"""Comparison methods without a network: bicubic, and two denoisers before it.

Every table of restored images should carry these rows: PSNR and SSIM of generative methods usually lie below bicubic.
All take and give images (1, 3, H, W) in [0, 1], as `evaluate` calls its methods.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from morsr.errors import ConfigError, InputError, MissingDependencyError
from morsr.evaluation.images import to_tensor, to_uint8

Method = Callable[[Tensor], Tensor]

# Strengths, as multiples of the estimated noise level, from a grid over 48 training photographs (BSDS500) under
# Real-ESRGAN degradations, for the highest PSNR-Y after upsampling: 0.27 and 0.28 dB above bicubic alone. They are far
# above the textbook values because JPEG and resampling smooth the noise, which the estimate then misses.
NLM_STRENGTH = 2.0
BILATERAL_STRENGTH = 14.0
_BILATERAL_RADIUS = 2.0  # spatial deviation in px
_NOISE_FLOOR = 3.0 / 255

# High-pass filter of the Daubechies wavelet with two vanishing moments.
_DB2_HIGH = np.array([-0.48296291314469025, 0.836516303737469, -0.22414386804185735, -0.12940952255092145])


def classical_methods(scale: float = 4.0) -> dict[str, Method]:
    """The comparison rows by name: "bicubic", "nlm+bicubic", "bilateral+bicubic".

    Args:
        scale: output side over input side.

    Raises:
        ConfigError: a scale that is not positive.
    """
    if not scale > 0:
        raise ConfigError(f"classical_methods: expected a positive scale, got {scale}")

    def after(denoise: Callable[[np.ndarray], np.ndarray] | None) -> Method:
        def method(lr: Tensor) -> Tensor:
            image = to_uint8(lr)
            image = image if denoise is None else denoise(image)
            height, width = (max(1, round(side * scale)) for side in image.shape[:2])
            return to_tensor(bicubic(image, height, width)).to(lr.device)

        return method

    return {
        "bicubic": after(None),
        "nlm+bicubic": after(non_local_means),
        "bilateral+bicubic": after(bilateral),
    }


def bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 by OpenCV's cubic interpolation (a = -0.75, no antialiasing).

    This is the bicubic row of the field's tables; MATLAB's and Pillow's kernel has a = -0.5 and gives other numbers.
    """
    cv2 = _cv2()
    _check(image, "bicubic")
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def estimate_noise(image: np.ndarray) -> float:
    """Noise level of (H, W, 3) uint8 as a standard deviation in [0, 1], the mean over channels.

    Median of the finest diagonal wavelet coefficients over 0.6745.

    Source:
        Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 1994, section 4.2; the rule
        that scikit-image's `estimate_sigma` follows.
    """
    _check(image, "estimate_noise")
    levels = []
    for channel in np.moveaxis(image.astype(np.float64) / 255, -1, 0):
        padded = np.pad(channel, 3, mode="symmetric")
        rows = sum(w * padded[:, k : padded.shape[1] - 3 + k] for k, w in enumerate(_DB2_HIGH))[:, ::2]
        detail = np.abs(sum(w * rows[k : rows.shape[0] - 3 + k] for k, w in enumerate(_DB2_HIGH))[::2])
        detail = detail[detail > 0]  # saturated areas hold no noise and would pull the median down
        levels.append(float(np.median(detail)) / 0.6745 if detail.size else 0.0)
    return float(np.mean(levels))


def non_local_means(image: np.ndarray, *, strength: float = NLM_STRENGTH) -> np.ndarray:
    """Non-local means on (H, W, 3) uint8: 5 px patches within 13 px, width `strength` times the noise level."""
    try:
        from skimage.restoration import denoise_nl_means
    except ImportError as error:
        raise MissingDependencyError(f"scikit-image cannot be imported ({error}); pip install scikit-image") from error
    sigma = max(estimate_noise(image), _NOISE_FLOOR)
    denoised = denoise_nl_means(
        image.astype(np.float32) / 255,
        h=strength * sigma,
        sigma=sigma,
        patch_size=5,
        patch_distance=6,
        fast_mode=True,
        channel_axis=-1,
    )
    return _to_8bit(denoised)


def bilateral(image: np.ndarray, *, strength: float = BILATERAL_STRENGTH) -> np.ndarray:
    """Bilateral filter on (H, W, 3) uint8, range deviation `strength` times the noise level."""
    _check(image, "bilateral")
    sigma = max(estimate_noise(image), _NOISE_FLOOR)
    denoised = _cv2().bilateralFilter(image.astype(np.float32) / 255, 9, strength * sigma, _BILATERAL_RADIUS)
    return _to_8bit(denoised)


def _to_8bit(image: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _check(image: np.ndarray, name: str) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise InputError(f"{name}: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")


def _cv2():
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenCV cannot be imported ({error}); pip install opencv-python-headless"
        ) from error
    return cv2
