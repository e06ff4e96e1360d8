"""`morsr selftest`: restore the bundled image and compare with what it should become.

The bundled image is drawn by code (discs, polygons, lines, text and noise texture; blurred, reduced, made noisy and
compressed), so that it is nobody's photograph.
"""

from __future__ import annotations

import platform
from importlib import metadata, resources
from pathlib import Path

from morsr.commands._common import Dtype

PACKAGES = ("torch", "diffusers", "numpy", "pillow")


def run(
    *,
    device: str = "auto",
    dtype: Dtype = "auto",
) -> int:
    """Restore a bundled image and compare with the expected output; 1 if it differs by more than rounding.

    Args:
        device: auto, cpu, cuda, cuda:1, mps, …
        dtype: precision
    """
    import numpy as np

    from morsr.imaging import read
    from morsr.restoring import Restorer

    restorer = Restorer.from_pretrained("tiny", device=device, dtype=dtype)
    precision = str(restorer.dtype).removeprefix("torch.")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    print(f"python {platform.python_version()}, {versions}")
    print(f"model tiny, {restorer.device}, {precision}")
    restored, expected = restorer(read(assets() / "selftest.png").rgb8), read(assets() / "tiny_expected.png").rgb8
    error = np.abs(restored.astype(float) - expected)
    mean, most = (0.1, 4) if precision == "float32" else (1.5, 40)
    same = bool(error.mean() < mean and error.max() <= most)
    print(f"{'ok' if same else 'DIFFERS'}: by {error.mean():.3f}/255 on average, {error.max():.0f}/255 at most")
    return 0 if same else 1


def assets() -> Path:
    """The folder with the bundled image and the expected outputs."""
    return Path(str(resources.files("morsr"))) / "assets"
