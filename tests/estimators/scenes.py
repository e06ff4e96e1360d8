"""A drawn scene and three ways to degrade it, for the tests of the estimators."""

import numpy as np
import torch

from morsr.functional.corrupt import jpeg


def scene(height=96, width=128, seed=0):
    """Random overlapping rectangles on a slope, softened as a camera would: edges of all heights, and flat areas."""
    rng = np.random.default_rng(seed)
    image = np.linspace(0.3, 0.6, 4 * width)[None, :, None] * np.ones((4 * height, 1, 3))
    for _ in range(60):
        top, left = rng.integers(0, 4 * height - 8), rng.integers(0, 4 * width - 8)
        high, wide = rng.integers(8, 2 * height), rng.integers(8, 2 * width)
        image[top : top + high, left : left + wide] = rng.uniform(0.1, 0.9, 3)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return torch.nn.functional.avg_pool2d(tensor, 4)


def blurred(image, sigma):
    taps = torch.arange(-12.0, 13.0)
    kernel = (-0.5 * (taps / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, -1, -1, -1)
    padded = torch.nn.functional.pad(image, (12,) * 4, mode="replicate")
    once = torch.nn.functional.conv2d(padded, kernel, groups=3)
    return torch.nn.functional.conv2d(once, kernel.transpose(-2, -1), groups=3)


def noisy(image, sigma):
    generator = torch.Generator().manual_seed(1)
    return (image + sigma / 255 * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def compressed(image, quality):
    return jpeg(image, torch.tensor([float(quality)])).mul(255).round().div(255)
