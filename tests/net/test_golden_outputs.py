"""The shipped model restores six small images as it did when `golden_outputs.npz` was written.

`python tests/net/test_golden_outputs.py` writes the file anew; do so only when an output changes on purpose. Every
output is kept as every fifth pixel of every fifth row, and as the means of blocks of 8 × 8 pixels, which together see
each pixel of the image; that keeps the file small.
"""

import io
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

FILE = Path(__file__).with_name("golden_outputs.npz")
MODELS = ("tiny",)


def inputs() -> dict[str, np.ndarray]:
    """Six small pictures (H, W, 3) in uint8, degraded by Pillow and NumPy alone."""
    from skimage import data

    noise = np.random.default_rng(0)
    astronaut, chelsea, coffee = (Image.fromarray(picture()) for picture in (data.astronaut, data.chelsea, data.coffee))
    camera = Image.fromarray(data.camera()).convert("RGB")

    def part(picture: Image.Image, left: int, top: int, width: int, height: int, factor: int = 4) -> Image.Image:
        box = (left, top, left + width * factor, top + height * factor)
        return picture.crop(box).resize((width, height), Image.Resampling.BICUBIC)

    noisy = np.asarray(part(coffee, 180, 60, 36, 28), dtype=np.float64)
    noisy = noisy + noise.normal(0, 20, noisy.shape)
    jpeg = io.BytesIO()
    part(chelsea, 60, 60, 40, 32).save(jpeg, format="JPEG", quality=30)
    mixed = part(astronaut, 0, 200, 32, 40).filter(ImageFilter.GaussianBlur(1.2))
    both = np.asarray(mixed, dtype=np.float64) + noise.normal(0, 8, (40, 32, 3))
    return {
        "clean": np.asarray(part(astronaut, 150, 40, 40, 40)),
        "blurred": np.asarray(part(chelsea, 150, 100, 40, 32).filter(ImageFilter.GaussianBlur(1.6))),
        "noisy": noisy.round().clip(0, 255).astype(np.uint8),
        "jpeg": np.asarray(Image.open(jpeg, formats=["JPEG"]).convert("RGB")),
        "gray, odd size": np.asarray(part(camera, 200, 60, 37, 31)),
        "blurred and noisy, odd size": both.round().clip(0, 255).astype(np.uint8)[:39, :29],
    }


def samples(image: Tensor) -> dict[str, np.ndarray]:
    """What is kept of an output (1, 3, H, W)."""
    return {
        "pixels": image[0, :, ::5, ::5].numpy(),
        "blocks": F.avg_pool2d(image, 8, ceil_mode=True, count_include_pad=False)[0].numpy(),
    }


def outputs(model: str, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Samples of what a shipped model makes of the images, by "model/image/sample"."""
    from morsr import Restorer

    restorer = Restorer.from_pretrained(model, device="cpu", dtype="float32")
    found = {}
    for name, pixels in images.items():
        lr = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        result = restorer(lr, scale=4, color="none")
        assert result.shape == (1, 3, 4 * lr.shape[2], 4 * lr.shape[3])
        found |= {f"{model}/{name}/{kind}": value for kind, value in samples(result).items()}
    return found


def machine() -> str:
    """What decides the last digits: the processor's instructions and the version of torch."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


@pytest.mark.parametrize("model", MODELS)
def test_output_unchanged(model):
    with np.load(FILE, allow_pickle=False) as golden:
        tolerance = 1e-5 if str(golden["machine"]) == machine() else 1e-4
        images = {name.removeprefix("input/"): golden[name] for name in golden.files if name.startswith("input/")}
        expected = {name: golden[name] for name in golden.files if name.startswith(f"{model}/")}
    found = outputs(model, images)
    assert len(images) == 6
    assert found.keys() == expected.keys()
    worst = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    assert max(worst.values()) <= tolerance, worst


def main() -> None:
    torch.set_num_threads(1)
    images = inputs()
    kept = {f"input/{name}": pixels for name, pixels in images.items()}
    for model in MODELS:
        kept |= outputs(model, images)
    np.savez_compressed(FILE, machine=np.array(machine()), **kept)


if __name__ == "__main__":
    main()
