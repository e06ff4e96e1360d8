"""`morsr bench degrade`: images per second of the degradation chain, against basicsr's chain on the same device."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from morsr.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

HELP = (
    "Degrade batches of photographs by the torch engine (one set of parameters per image) and by basicsr's chain (one "
    "set per batch, kernels included), in turn, and print images per second and their ratio with a 95 % interval; then "
    "operator by operator; last, dead-leaves images rendered per second, which have no peer. Processor time is given "
    "beside wall time: on a busy machine it is the steadier of the two."
)
LEAVES_BATCH, LEAVES_SIZE = 8, 256


class Timing(NamedTuple):
    """Seconds of one call: by the clock on the wall, and of all threads of this process."""

    wall: float
    processor: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--recipe", default="realesrgan", help="preset or .yaml file (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images per batch (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="side of the HR images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=24, help="batches per engine (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch on the CPU (default: as set)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 images of 128 pixels: does it run?")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return {"title", "settings", "rows"}; a row holds both engines' figures and their ratio.

    The last row, of dead leaves, holds ours alone.

    Raises:
        ConfigError: a number below its least, or a device that cannot be used.
        MissingDependencyError: basicsr is not installed.
    """
    batch, size, rounds = (2, 128, 2) if args.quick else (args.batch, args.size, args.rounds)
    for name, value, least in (("batch", batch, 1), ("size", size, 64), ("rounds", rounds, 1)):
        if value < least:
            raise ConfigError(f"--{name}: expected at least {least}, got {value}")

    import torch

    from morsr.degradation import DegradationRecipe
    from morsr.degradation.reference import BasicsrChain

    recipe = DegradationRecipe.load(args.recipe)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.device(args.device) if args.device != "auto" else accelerator or torch.device("cpu")
        hr = photographs(batch, size).to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {args.device}: cannot be used ({str(error).splitlines()[0]})") from error
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with torch.random.fork_rng(devices=[]):  # basicsr draws from the global generators
            torch.manual_seed(args.seed)
            rows = [_row("full chain", batch, *_chains(hr, recipe, BasicsrChain(recipe), rounds, args.seed))]
            rows += [
                _row(name, batch, *_alternate(ours, theirs, max(rounds // 4, 2), device))
                for name, ours, theirs in _operators(hr, args.seed)
            ]
            rows.append(_dead_leaves(64 if args.quick else LEAVES_SIZE, max(rounds // 2, 2), args.seed, device))
    finally:
        used = torch.get_num_threads()
        torch.set_num_threads(threads)
    settings = {
        "recipe": recipe.name,
        "batch": batch,
        "hr_size": size,
        "rounds": rounds,
        "seed": args.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": used,
        "torch": torch.__version__,
    }
    return {"title": "degradation: torch engine against basicsr", "settings": settings, "rows": rows}


def photographs(count: int, size: int) -> Tensor:
    """(count, 3, size, size) crops of scikit-image's astronaut, mirrored at its borders where it is too small."""
    import torch
    from skimage import data

    pixels = data.astronaut()
    generator = np.random.default_rng(0)
    wide = np.pad(pixels, ((0, size), (0, size), (0, 0)), mode="symmetric")
    corners = generator.integers(0, pixels.shape[0], (count, 2))
    crops = np.stack([wide[top : top + size, left : left + size] for top, left in corners])
    return torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous().float() / 255


def _chains(hr: Tensor, recipe: Any, chain: Any, rounds: int, seed: int) -> tuple[list[Timing], list[Timing]]:
    import torch

    from morsr.degradation import apply

    draw = torch.Generator().manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    return _alternate(lambda: apply(hr, recipe.sample(len(hr), generator=draw)), lambda: chain(hr), rounds, hr.device)


def _operators(hr: Tensor, seed: int) -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, our call and basicsr's for every operator, on the same batch at full size."""
    import torch

    from morsr.degradation import DegradationRecipe
    from morsr.degradation.basicsr_compat import import_basicsr
    from morsr.functional.corrupt import add_gaussian_noise, add_poisson_noise, jpeg
    from morsr.functional.kernels import blur_kernels, filter_images

    degradations, utils = import_basicsr("data.degradations"), import_basicsr("utils")
    filter_2d = import_basicsr("utils.img_process_util").filter2D
    blur = DegradationRecipe().sample(len(hr), generator=torch.Generator().manual_seed(seed)).first.blur
    kernels = blur_kernels(**vars(blur)).to(hr.device)
    generator = torch.Generator(device=hr.device).manual_seed(seed)
    quality = torch.linspace(30, 95, len(hr), device=hr.device)
    diff_jpeg = utils.DiffJPEG(differentiable=False).to(hr.device)
    # Two in five images get gray noise, so basicsr always computes both fields; ours computes the one that is used.
    gray = [place % 5 < 2 for place in range(len(hr))]
    gray_flags = torch.tensor(gray, device=hr.device).float()

    def noise(add: Callable[..., Tensor], level: float) -> Callable[[], None]:
        def every() -> None:
            for image, flag in zip(hr.split(1), gray, strict=True):
                add(image, level, gray=flag, generator=generator)

        return every

    return [
        ("blur", lambda: filter_images(hr, kernels), lambda: filter_2d(hr, kernels)),
        (
            "Gaussian noise",
            noise(add_gaussian_noise, 10.0),
            lambda: degradations.add_gaussian_noise_pt(hr, torch.full_like(quality, 10.0), gray_flags),
        ),
        (
            "Poisson noise",
            noise(add_poisson_noise, 1.0),
            lambda: degradations.add_poisson_noise_pt(hr, torch.ones_like(quality), gray_noise=gray_flags),
        ),
        (
            "JPEG",
            lambda: [jpeg(image, one) for image, one in zip(hr.split(1), quality.split(1), strict=True)],
            lambda: diff_jpeg(hr, quality=quality.clone()),
        ),
    ]


def _dead_leaves(size: int, rounds: int, seed: int, device: Any) -> dict[str, Any]:
    """Rendered images per second, other images every time."""
    import torch

    from morsr.data.dead_leaves import dead_leaves

    draw = torch.Generator().manual_seed(seed)

    def render() -> None:
        dead_leaves(LEAVES_BATCH, size, generator=draw, device=device)

    _timed(render, device)
    ours = [_timed(render, device) for _ in range(rounds)]
    row: dict[str, Any] = {"what": f"dead leaves, {size}²"}
    for field, label in (("wall", ""), ("processor", " (processor time)")):
        row[f"morsr images/s{label}"] = LEAVES_BATCH * rounds / sum(getattr(timing, field) for timing in ours)
    return row


def _alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, device: Any
) -> tuple[list[Timing], list[Timing]]:
    """Time both calls in turn, after one call of each that does not count."""
    _timed(ours, device), _timed(theirs, device)
    pairs = [(_timed(ours, device), _timed(theirs, device)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _timed(call: Callable[[], Any], device: Any) -> Timing:
    import torch

    wall, processor = time.perf_counter(), time.process_time()
    with torch.no_grad():
        call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return Timing(time.perf_counter() - wall, time.process_time() - processor)


def _row(name: str, batch: int, ours: list[Timing], theirs: list[Timing]) -> dict[str, Any]:
    row: dict[str, Any] = {"what": name}
    for field, label in (("wall", ""), ("processor", " (processor time)")):
        own, other = (np.array([getattr(timing, field) for timing in timings]) for timings in (ours, theirs))
        low, high = _ratio_interval(own, other)
        row |= {
            f"morsr images/s{label}": batch * len(own) / float(own.sum()),
            f"basicsr images/s{label}": batch * len(other) / float(other.sum()),
            f"ratio{label}": float(other.sum() / own.sum()),
            f"ratio low{label}": low,
            f"ratio high{label}": high,
        }
    return row


def _ratio_interval(own: np.ndarray, other: np.ndarray, *, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of total times."""
    place = np.random.default_rng(0).integers(0, len(own), (draws, len(own)))
    ratios = other[place].sum(axis=1) / own[place].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
