"""`morsr routing`: which ranks run for which image, as one HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morsr.errors import ConfigError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor

    from morsr.evaluation.example import Example
    from morsr.evaluation.routing import RoutingTable
    from morsr.restoring import Restorer

HELP = (
    "Route images with the degradation estimator and the router, which takes no UNet, and write one HTML page that "
    "works offline: load of every slot, what each slot is for, zero slots against severity, active ranks along the "
    "network, and one image with groups of ranks switched off."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("input", metavar="IN", help="image, folder of images, or a table that --table or a run wrote")
    parser.add_argument("--out", required=True, metavar="HTML", help="the page")
    parser.add_argument("--model", default="tiny", help="shipped preset, adapters file, saved folder or checkpoint")
    parser.add_argument("--base", help="folder or hub id of the base model, if the adapters do not bring it")
    parser.add_argument("--table", metavar="FILE", help="also write the routing as one .safetensors")
    parser.add_argument(
        "--degrade", metavar="RECIPE",
        help="the images are sharp: degrade them by this recipe first, so that the true degradations are known",
    )  # fmt: skip
    parser.add_argument("--copies", type=int, default=1, help="with --degrade: degradations per image (default: 1)")
    parser.add_argument("--seed", type=int, help="with --degrade: seed of the degradations (default: 0)")
    parser.add_argument(
        "--example", metavar="NAME",
        help="image shown in depth: its stem, or its path in the folder where stems repeat; or none "
        "(default: the most severe)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")


def run(options: argparse.Namespace) -> int:
    """Make the page; 1 if some files could not be read.

    Raises:
        MorsrError: nothing to route, a wrong setting, or a model that cannot be loaded, before anything is written.
    """
    source, out = Path(options.input).expanduser(), Path(options.out).expanduser()
    _check(options, source, out)
    from morsr.data.sources import distinct_names
    from morsr.evaluation.report import write_report
    from morsr.evaluation.routing import RoutingTable
    from morsr.files import printable

    if source.suffix == ".safetensors":
        table = RoutingTable.load(source)
        write_report(table, out, title=printable(f"Which ranks run: {source.name}"))
        print(out)
        return 0

    from morsr.restoring import Restorer

    paths = _images(source)
    names = [printable(name) for name in distinct_names(dict.fromkeys(map(str, paths), source)).values()]
    restorer = Restorer.from_pretrained(options.model, base=options.base, device=options.device, dtype="float32")
    parts, failed, pictures = _route(restorer, paths, names, options)
    if not parts:
        raise InputError(f"{source}: none of the {len(paths)} images can be read; the first: {failed[0]}")
    table = RoutingTable.concatenate(parts)
    wanted = None if options.example is None else printable(options.example)
    _check_example(table, wanted)
    if options.table:
        table.save(options.table)
    examples = _example(restorer, table, pictures, wanted)
    notes = [printable(f"{len(failed)} of {len(paths)} images could not be read: {failed[0]}")] if failed else []
    title = printable(f"Which ranks run: {options.model} on {source.name}")
    write_report(table, out, examples=examples, notes=notes, title=title)
    for line in failed:
        print(line, file=sys.stderr)
    print(out)
    return 1 if failed else 0


def _check(options: argparse.Namespace, source: Path, out: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("plotly") is None:
        raise MissingDependencyError("morsr routing needs plotly: pip install 'morsr[report]'")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out: expected a name that ends in .html, got {options.out}")
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if out.is_dir():
        raise InputError(f"{out}: expected the name of a file, this is a folder")
    from morsr.degradation.keys import check_seed

    if options.copies < 1:
        raise ConfigError(f"--copies: expected at least 1, got {options.copies}")
    if options.seed is not None and not options.degrade:
        raise ConfigError("--seed goes with --degrade: nothing else is drawn")
    check_seed(options.seed or 0)
    if options.copies > 1 and not options.degrade:
        raise ConfigError("--copies goes with --degrade: an image as it is has one routing")
    if source.suffix == ".safetensors" and (options.degrade or options.table or options.example):
        raise ConfigError("a table holds no images: --degrade, --table and --example go with images")
    if options.table and Path(options.table).suffix != ".safetensors":
        raise ConfigError(f"--table: expected a name that ends in .safetensors, got {options.table}")
    if options.degrade:
        from morsr.degradation import DegradationRecipe

        DegradationRecipe.load(options.degrade)


def _images(source: Path) -> list[Path]:
    from morsr.imaging import list_images

    return list_images(source)


def _route(
    restorer: Restorer, paths: list[Path], names: list[str], options: argparse.Namespace
) -> tuple[list[RoutingTable], list[str], list[Any]]:
    """Tables of the images that can be read, complaints about the others, and how to get the LR image of each row."""
    import torch
    from tqdm import tqdm

    from morsr.degradation import DegradationRecipe, apply, sample_keys
    from morsr.evaluation.routing import RoutingTable
    from morsr.imaging.files import read_planes

    parts: list[RoutingTable] = []
    failed: list[str] = []
    pictures: list[Any] = []
    recipe = DegradationRecipe.load(options.degrade) if options.degrade else None
    for index, (path, name) in enumerate(zip(tqdm(paths, unit="image", disable=None), names, strict=True)):
        try:
            image = read_planes(path)
            if recipe is None:
                parts.append(RoutingTable.from_images(restorer, image, names=[name], scores_only=True))
                pictures.append(path)
                continue
            hr = _hr_crop(image, path)
        except InputError as error:
            failed.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        numbers = index * options.copies + torch.arange(options.copies)
        drawn = recipe.sample(sample_keys(options.seed or 0, 0, numbers))
        copies = [f"{name}-{copy}" if options.copies > 1 else name for copy in range(options.copies)]
        lr = apply(hr.expand(options.copies, -1, -1, -1), drawn)
        parts.append(RoutingTable.from_images(restorer, lr, drawn, recipe=recipe, names=copies, scores_only=True))
        pictures += lr.split(1)
    return parts, failed, pictures


def _hr_crop(image: Tensor, path: Path, *, side: int = 512) -> Tensor:
    """Centre of a sharp image, at most `side` pixels and a multiple of 4 each way, as the recipes need it."""
    height, width = (min(length, side) // 4 * 4 for length in image.shape[-2:])
    if min(height, width) < 64:
        raise InputError(
            f"{path}: {image.shape[-1]}x{image.shape[-2]} pixels are too few to degrade; 64 each way are needed"
        )
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[..., top : top + height, left : left + width]


def _check_example(table: RoutingTable, wanted: str | None) -> None:
    """Raise InputError for an --example that no image of the table is called."""
    if wanted in (None, "none", *table.names) or not table.is_routed:
        return
    alike = [name for name in table.names if str(wanted) in name] or table.names
    raise InputError(f"--example: no image is called {wanted!r}; there are {', '.join(alike[:5])} …")


def _example(restorer: Restorer, table: RoutingTable, pictures: list[Any], wanted: str | None) -> list[Example]:
    from morsr.evaluation.example import examine
    from morsr.imaging.files import read_planes

    if wanted == "none" or not table.is_routed:
        return []
    row = int(table.severity.argmax()) if wanted is None else table.names.index(wanted)
    try:
        specialisation = table.specialisation()
    except InputError:
        specialisation = None  # the page says why
    lr = read_planes(pictures[row]).to(restorer.device)
    return [examine(restorer.generator, lr, name=table.names[row], specialisation=specialisation)]
