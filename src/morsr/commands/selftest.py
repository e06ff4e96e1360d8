"""`morsr selftest`: restore the bundled image, compare with what it should become, and say what differs.

The bundled image is drawn by code (discs, polygons, lines, text and noise texture; blurred, reduced, made noisy and
compressed), so that it is nobody's photograph.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from morsr.commands._common import Dtype
from morsr.files import printable

if TYPE_CHECKING:
    from torch import Tensor

    from morsr.restoring import Restorer

PACKAGES = ("torch", "diffusers", "numpy", "pillow", "opencv-python-headless")
TILE = 256


class Check(NamedTuple):
    """One comparison: what was looked at, whether it is as it should be, and the figure."""

    name: str
    good: bool
    figure: str


def run(
    *,
    model: str = "tiny",
    base: str | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    save: Path | None = None,
    record: Path | None = None,
) -> int:
    """Restore a bundled image and compare with the expected output, step by step; 1 if a check fails.

    Args:
        model: expected outputs are shipped for the shipped models
        base: folder or hub id of the base model, if the adapters do not bring it
        device: auto, cpu, cuda, cuda:1, mps, …
        dtype: precision
        save: write the restored image into this PNG, to look at
        record: write this machine's result as the expected one, into this folder

    Raises:
        MorsrError: a model that cannot be loaded.
    """
    from PIL import Image

    from morsr.imaging import read_rgb
    from morsr.restoring import Restorer

    restorer = Restorer.from_pretrained(model, base=base, device=device, dtype=dtype)
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    print(f"python {platform.python_version()}, {versions}")
    print(f"model {printable(model)}, {restorer.device}, {str(restorer.dtype).removeprefix('torch.')}")
    image = Image.fromarray(read_rgb(assets() / "selftest.png"))
    result = measure(restorer, image)
    if save is not None:
        from morsr.imaging import read, write

        write(read(result["image"]), save)
        print(printable(f"restored image: {save}"))
    if record is not None:
        print(f"recorded: {record_result(result, record, Path(model).name)}")
        return 0
    expected = load_expected(assets(), Path(model).name)
    checks: list[Check] = []
    if expected is None:
        print(f"no expected output is shipped for {model}: only what needs none is checked")
    else:
        checks += comparisons(result, expected, exact=str(restorer.dtype) == "torch.float32")
    checks += own_checks(restorer, image, result)
    for check in checks:
        print(f"{'ok    ' if check.good else 'DIFFER'}  {check.name:<10} {check.figure}")
    failed = [check.name for check in checks if not check.good]
    if failed:
        # The checks stand in the order of the flow, so the first one that differs is where to look.
        print(f"{len(failed)} of {len(checks)} checks differ; the first in the flow is: {failed[0]}")
    return 1 if failed else 0


def assets() -> Path:
    """The folder with the bundled image and the expected outputs."""
    return Path(str(resources.files("morsr"))) / "assets"


def measure(restorer: Restorer, image: Any) -> dict[str, Any]:
    """Restore the bundled image and collect everything that is compared."""
    import numpy as np
    import torch

    restored, routing = restorer(image, return_routing=True)
    lr = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(restorer.device) / 255
    scores = None if restorer.generator.estimator is None else restorer.generator.estimator(lr)
    return {
        "weights": digest(restorer.generator),
        "scores": None if scores is None else dict(zip(scores.names, scores.scores[0].tolist(), strict=True)),
        "chosen": None if routing is None else routing.chosen[:, 0].tolist(),
        "image": restored,
    }


def own_checks(restorer: Restorer, image: Any, result: dict[str, Any]) -> Iterator[Check]:
    """What must hold for any model: the same result again, sensible tiles, kinds that stay."""
    import numpy as np

    first = np.asarray(result["image"], float)
    again = np.asarray(restorer(image), float)
    yield Check(
        "repeat", bool((again == first).all()), f"a second run differs by {np.abs(again - first).max():.0f}/255"
    )
    tiled = np.asarray(restorer(image, tile=TILE), float)
    quality = _psnr(tiled, first)
    yield Check("tiles", quality > 30, f"tiles of {TILE} against one pass: {quality:.1f} dB")
    for mode in ("L", "RGBA"):
        restored = restorer(image.convert(mode), scale=1.5)
        good = restored.mode == mode and restored.size == tuple(round(side * 1.5) for side in image.size)
        yield Check(f"kind {mode}", good, f"came back as {restored.mode}, {restored.size[0]} x {restored.size[1]}")


def comparisons(result: dict[str, Any], expected: dict[str, Any], *, exact: bool) -> Iterator[Check]:
    """Compare with the recorded result, in the order of the flow.

    Args:
        result, expected: see `measure`.
        exact: float32; half precision may differ by more.
    """
    import numpy as np

    same = result["weights"] == expected["weights"]
    yield Check("weights", same, "as recorded" if same else "other weights than the recorded ones")
    if expected["scores"] is not None:
        ours = result["scores"] or {}
        worst = max(abs(ours.get(name, 2.0) - value) for name, value in expected["scores"].items())
        yield Check("scores", worst < 2e-3, f"degradation scores differ by at most {worst:.1e}")
        ours, wanted = np.array(result["chosen"]), np.array(expected["chosen"])
        share = float((ours == wanted).mean()) if ours.shape == wanted.shape else 0.0
        yield Check("routing", share > 0.98, f"{share:.1%} of the chosen ranks as recorded")
    ours, wanted = (np.asarray(values["image"], float) for values in (result, expected))
    if ours.shape != wanted.shape:
        yield Check("output", False, f"size {ours.shape} instead of {wanted.shape}")
        return
    mean, worst = np.abs(ours - wanted).mean(), np.abs(ours - wanted).max()
    figure = f"differs by {mean:.3f}/255 on average, {worst:.0f}/255 at most, {_psnr(ours, wanted):.1f} dB"
    yield Check("output", bool(mean < (0.1 if exact else 1.5) and worst <= (4 if exact else 40)), figure)


def record_result(result: dict[str, Any], folder: Path, name: str) -> Path:
    """Write a result as the expected one: NAME_expected.png and NAME_expected.json."""
    from morsr.files import write_text
    from morsr.imaging import read, write

    write(read(result["image"]), folder / f"{name}_expected.png")
    rest = {key: value for key, value in result.items() if key != "image"}
    write_text(folder / f"{name}_expected.json", json.dumps(rest))
    return folder / f"{name}_expected.png"


def load_expected(folder: Path, name: str) -> dict[str, Any] | None:
    """The recorded result of a model, or None."""
    from PIL import Image

    from morsr.imaging import read_rgb

    data, picture = folder / f"{name}_expected.json", folder / f"{name}_expected.png"
    if not data.is_file() or not picture.is_file():
        return None
    return {**json.loads(data.read_text()), "image": Image.fromarray(read_rgb(picture))}


def digest(model: Any) -> str:
    """A short fingerprint of all weights."""
    found = hashlib.sha256()
    tensors: dict[str, Tensor] = model.state_dict()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _psnr(ours: Any, wanted: Any) -> float:
    import numpy as np

    return float(10 * np.log10(255**2 / max(1e-8, float(np.square(ours - wanted).mean()))))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
