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
from typing import TYPE_CHECKING, Any

from morsr.commands._common import Dtype
from morsr.errors import InputError
from morsr.files import printable

if TYPE_CHECKING:
    from torch import nn

    from morsr.restoring import Restorer

PACKAGES = ("torch", "diffusers", "numpy", "pillow")


def run(
    *,
    model: str = "tiny",
    base: str | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    record: Path | None = None,
) -> int:
    """Restore a bundled image and compare with the expected output, step by step; 1 if a check fails.

    Args:
        model: a shipped preset, whose expected output is in the package
        base: folder or hub id of the base model, if the adapters do not bring it
        device: auto, cpu, cuda, cuda:1, mps, …
        dtype: precision
        record: folder to write this machine's image and figures into, as a release does; nothing is compared
    """
    from morsr.files import write_text
    from morsr.imaging import read, write
    from morsr.restoring import Restorer

    restorer = Restorer.from_pretrained(model, base=base, device=device, dtype=dtype)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    print(f"python {platform.python_version()}, {versions}")
    print(f"model {printable(model)}, {restorer.device}, {str(restorer.dtype).removeprefix('torch.')}")
    found = measure(restorer)
    name = Path(model).name
    if record is not None:
        write(read(found["image"]), record / f"{name}_expected.png")
        facts = {key: value for key, value in found.items() if key != "image"}
        write_text(record / f"{name}_expected.json", json.dumps(facts))
        print(printable(f"recorded: {record / name}_expected.png"))
        return 0
    data = assets() / f"{name}_expected.json"
    if not data.is_file():
        raise InputError(f"{model}: no expected output is shipped for it; give one of the shipped presets")
    expected = json.loads(data.read_text()) | {"image": read(data.with_suffix(".png")).rgb8}
    checks = list(comparisons(found, expected, exact=str(restorer.dtype) == "torch.float32"))
    for what, good, figure in checks:
        print(f"{'ok    ' if good else 'DIFFER'}  {what:<10} {figure}")
    failed = [what for what, good, _ in checks if not good]
    if failed:
        # The checks stand in the order of the flow, so the first one that differs is where to look.
        print(f"{len(failed)} of {len(checks)} checks differ; the first in the flow is: {failed[0]}")
    return 1 if failed else 0


def assets() -> Path:
    """The folder with the bundled image and the expected outputs."""
    return Path(str(resources.files("morsr"))) / "assets"


def measure(restorer: Restorer) -> dict[str, Any]:
    """Restore the bundled image and collect everything that is compared."""
    from morsr.imaging import read

    picture = read(assets() / "selftest.png")
    restored, routing = restorer(picture.rgb8, return_routing=True)
    estimator = restorer.generator.estimator
    found = None if estimator is None else estimator(picture.rgb.to(restorer.device))
    return {
        "weights": digest(restorer.generator),
        "scores": None if found is None else dict(zip(found.names, found.scores[0].tolist(), strict=True)),
        "chosen": None if routing is None else routing.chosen[:, 0].tolist(),
        "image": restored,
    }


def comparisons(found: dict[str, Any], expected: dict[str, Any], *, exact: bool) -> Iterator[tuple[str, bool, str]]:
    """Compare with the recorded result: what was looked at, whether it is as it should be, and the figure.

    Args:
        found, expected: see `measure`.
        exact: float32; half precision may differ by more.
    """
    import numpy as np

    same = found["weights"] == expected["weights"]
    yield "weights", same, "as recorded" if same else "other weights than the recorded ones"
    if expected["scores"] is not None:
        scores = found["scores"] or {}
        worst = max(abs(scores.get(name, 2.0) - value) for name, value in expected["scores"].items())
        yield "scores", worst < 2e-3, f"differ by {worst:.1e} at most"
        ours, wanted = np.array(found["chosen"]), np.array(expected["chosen"])
        share = float((ours == wanted).mean()) if ours.shape == wanted.shape else 0.0
        yield "routing", share > 0.98, f"{share:.1%} of the chosen ranks as recorded"
    error = np.abs(found["image"].astype(float) - expected["image"].astype(float))
    good = bool(error.mean() < (0.1 if exact else 1.5) and error.max() <= (4 if exact else 40))
    yield "output", good, f"differs by {error.mean():.3f}/255 on average, {error.max():.0f}/255 at most"


def digest(model: nn.Module) -> str:
    """A short fingerprint of all weights."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
