"""Cut large photographs into overlapping sub-images, so that training reads small files.

    python data_prep/cut_subimages.py DIV2K_train_HR DIV2K_train_HR_sub --size 512 --step 480

Sub-images are named STEM_s001.png, … in the subfolders of their photographs. The last row and column of an image are
cut from its edge, so nothing is lost. A stopped run goes on where it was: sub-images that are there are not cut again.
Photographs of one name (a.jpg, a.png), and an OUT that was cut with another size, step or slack, which cuts.json there
tells, are refused.
Files that cannot be read are named at the end, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from morsr.data.images import find_images, image_size, load_image
from morsr.data.outputs import output_folder
from morsr.errors import InputError, MorsrError
from morsr.files import atomic_path, write_text

SETTINGS = "cuts.json"


class Result(NamedTuple):
    """What became of one photograph: sub-images made, sub-images that were there, why it failed ("" if it did not)."""

    path: str
    made: int
    present: int
    error: str = ""


def positions(length: int, size: int, step: int, slack: int) -> list[int]:
    """Where the cuts start along one side; a rest of at most `slack` pixels is left over."""
    starts = list(range(0, length - size + 1, step))
    if starts and length - (starts[-1] + size) > slack:
        starts.append(length - size)
    return starts


def cut(path: str, *, source: Path, target: Path, size: int, step: int, slack: int) -> Result:
    """Cut one photograph; a sub-image appears whole, so one that is there needs no second look."""
    folder = target / Path(path).relative_to(source).parent
    try:
        width, height = image_size(path)
        boxes = [
            (left, top, left + size, top + size)
            for top in positions(height, size, step, slack)
            for left in positions(width, size, step, slack)
        ]
        if not boxes:
            return Result(path, 0, 0, f"{path}: {width}x{height} pixels, smaller than {size}")
        names = [folder / f"{Path(path).stem}_s{number:03d}.png" for number in range(1, len(boxes) + 1)]
        missing = [(name, box) for name, box in zip(names, boxes, strict=True) if not name.is_file()]
        photograph = Image.fromarray(load_image(path)) if missing else None
    except InputError as error:
        return Result(path, 0, 0, str(error))
    if photograph is not None:
        for name, box in missing:
            with atomic_path(name) as part:  # its errors end the run: the next photograph would meet them too
                photograph.crop(box).save(part, format="PNG", compress_level=3)
    return Result(path, len(missing), len(boxes) - len(missing))


def check_names(source: Path, paths: Sequence[str]) -> None:
    """Raise InputError for photographs whose sub-images would have the same names."""
    by_stem: dict[Path, list[str]] = defaultdict(list)
    for path in paths:
        by_stem[Path(path).relative_to(source).with_suffix("")].append(path)
    twins = [", ".join(Path(path).name for path in found) for found in by_stem.values() if len(found) > 1]
    if twins:
        raise InputError(f"{source}: images of one name would share their sub-images: {'; '.join(twins[:5])}; rename")


def keep_settings(target: Path, settings: dict[str, int]) -> None:
    """Note how the sub-images of a folder are cut; raise InputError if those that are there were cut otherwise."""
    path = target / SETTINGS
    tile = next(target.rglob("*_s[0-9][0-9][0-9].png"), None)
    found: object = None
    if tile is not None and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: cannot be read ({error}); choose another OUT") from error
    elif tile is not None:  # of a run that noted nothing
        width, height = image_size(tile)
        found = settings if width == height == settings["size"] else f"{tile.name} of {width}x{height} pixels"
    if found is not None and found != settings:
        raise InputError(f"{target}: holds sub-images cut otherwise ({found}, now {settings}); choose another OUT")
    write_text(path, json.dumps(settings) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--size", type=int, default=512, help="side of a sub-image in pixels (default: 512)")
    parser.add_argument("--step", type=int, default=480, help="distance between sub-images (default: 480)")
    parser.add_argument("--slack", type=int, default=16, help="a rest of so many pixels is left over (default: 16)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = parser.parse_args(arguments)
    try:
        if not (
            options.size >= 16 and 1 <= options.step <= options.size and options.slack >= 0 and options.workers > 0
        ):
            raise InputError("expected --size >= 16, 1 <= --step <= size, --slack >= 0 and --workers >= 1")
        source, target = options.source.resolve(), options.target.resolve()
        if target == source or source in target.parents:
            raise InputError(
                f"{options.target}: the output must lie outside {options.source}, or it would be cut again"
            )
        paths = find_images(source)
        check_names(source, paths)
        settings = {"size": options.size, "step": options.step, "slack": options.slack}
        keep_settings(output_folder(target), settings)
        work = partial(cut, source=source, target=target, **settings)
        with ProcessPoolExecutor(min(options.workers, len(paths))) as pool:
            results = list(tqdm(pool.map(work, paths, chunksize=4), total=len(paths), unit="image"))
    except (MorsrError, OSError) as error:
        print(f"cut_subimages: {error}", file=sys.stderr)
        return 2
    failed = [result.error for result in results if result.error]
    made, present = sum(result.made for result in results), sum(result.present for result in results)
    print(f"{len(paths)} photographs: {made} sub-images made, {present} were there, in {options.target}")
    for problem in failed:
        print(f"passed over: {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
