"""Cut large photographs into overlapping sub-images, so that training reads small files.

    python data_prep/cut_subimages.py DIV2K_train_HR DIV2K_train_HR_sub --size 512 --step 480

Sub-images keep the subfolders of their photographs and are named STEM_SIZE_TOP_LEFT.png. The last row and column of an
image are cut from its edge, so nothing is lost. A stopped run can be started again: sub-images that exist are kept.
Files that cannot be read are named at the end, and the exit code is then 1.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from PIL import Image
from tqdm import tqdm

from morsr.data.sources import some
from morsr.errors import InputError, MorsrError
from morsr.files import atomic_path
from morsr.imaging import list_images, read_rgb


def cut(path: str, *, source: Path, target: Path, size: int, step: int) -> str:
    """Cut one photograph; returns why it was passed over, or an empty text."""
    try:
        photograph = Image.fromarray(read_rgb(path))
    except InputError as error:
        return str(error)
    if min(photograph.size) < size:
        return f"{path}: {photograph.width}x{photograph.height} pixels, smaller than {size}"
    lefts, tops = ([*range(0, side - size, step), side - size] for side in photograph.size)
    stem = target / Path(path).relative_to(source).with_suffix("")
    for top in tops:
        for left in lefts:
            name = stem.with_name(f"{stem.name}_{size}_{top:04d}_{left:04d}.png")
            if not name.is_file():
                with atomic_path(name) as part:
                    photograph.crop((left, top, left + size, top + size)).save(part, format="PNG", compress_level=3)
    return ""


def main(source: Path, target: Path, size: PositiveInt = 512, step: PositiveInt = 480) -> int:
    """Cut large photographs into overlapping sub-images.

    Args:
        source: folder of photographs, searched with its subfolders.
        target: folder of the sub-images, outside the source.
        size: side of a sub-image in pixels.
        step: distance between sub-images, at most the size.
    """
    source, target = source.resolve(), target.resolve()
    try:
        if step > size:
            raise InputError(f"--step: expected at most the size {size}, got {step}")
        if target == source or source in target.parents:
            raise InputError(f"{target}: expected a folder outside {source}, or it would be cut again")
        paths, work = [*map(str, list_images(source))], partial(cut, source=source, target=target, size=size, step=step)
        often = Counter(Path(path).with_suffix("") for path in paths)
        if twins := [str(stem) for stem, count in often.items() if count > 1]:
            raise InputError(f"images of one name would share their sub-images: {some(twins)}; rename some")
        with ProcessPoolExecutor(min(os.cpu_count() or 1, len(paths))) as pool:
            problems = [found for found in tqdm(pool.map(work, paths), total=len(paths), unit="image") if found]
    except (MorsrError, OSError) as error:
        print(f"cut_subimages: {error}", file=sys.stderr)
        return 2
    print(f"{len(paths) - len(problems)} of {len(paths)} photographs are cut, in {target}")
    for problem in problems:
        print(f"passed over: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(auto_cli(main, as_positional=True))
