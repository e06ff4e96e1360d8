"""The shipped model restores six small images as it did when `golden_outputs.npz` was written.

`python tests/net/test_golden_outputs.py` writes the outputs anew; do so only when one changes on purpose. Every
output is kept as every fifth pixel of every fifth row, and as the means of blocks of 8 × 8 pixels, which together see
each pixel of the image; that keeps the file small.
"""

import platform
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILE = Path(__file__).with_name("golden_outputs.npz")


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


def images() -> dict[str, np.ndarray]:
    """The six pictures (H, W, 3), uint8."""
    with np.load(FILE, allow_pickle=False) as golden:
        return {name.removeprefix("input/"): golden[name] for name in golden.files if name.startswith("input/")}


def test_output_unchanged():
    with np.load(FILE, allow_pickle=False) as golden:
        tolerance = 1e-5 if str(golden["machine"]) == machine() else 1e-4
        expected = {name: golden[name] for name in golden.files if name.startswith("tiny/")}
    found = outputs("tiny", images())
    assert len(images()) == 6
    assert found.keys() == expected.keys()
    worst = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    assert max(worst.values()) <= tolerance, worst


def main() -> None:
    torch.set_num_threads(1)
    kept = {f"input/{name}": pixels for name, pixels in images().items()} | outputs("tiny", images())
    np.savez_compressed(FILE, machine=np.array(machine()), **kept)


if __name__ == "__main__":
    main()
