"""Pairing files by their names and checking them, before any is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from morsr.errors import InputError
from morsr.evaluation.images import SUFFIXES, ImageHeader, mismatch, read_header, unusable
from morsr.models.jobs import unread_images, walk_images


@dataclass(frozen=True)
class Job:
    """One reference image with the outputs of every method for it.

    Attributes:
        stem: the name that the files share: the path within their folders, without suffix.
        outputs: method to file.
        hr: the reference, or None when scoring without one.
        lr: the input, for the bicubic row, or None.
    """

    stem: str
    outputs: dict[str, Path]
    hr: Path | None = None
    lr: Path | None = None

    def place(self, text: str) -> str:
        """What was said of one of the files, by its name alone, with the subfolder before it."""
        folder = Path(self.stem).parent
        return text if folder == Path() else f"{folder.as_posix()}/{text}"


def find_images(where: Path, role: str, problems: list[str], apart: Sequence[Path] = ()) -> dict[str, Path]:
    """Image files of a folder and its subfolders by the path within it, without suffix ("sub/a"); or one file.

    Files that share such a path are added to `problems` and none of them is returned. What a folder leaves out, and
    which links are followed: see `morsr.models.jobs.walk_images`.

    Args:
        where: the folder or file.
        role: what it is called in messages.
        problems: is added to.
        apart: folders that are left out should they lie below.

    Raises:
        InputError: nothing is there, or the folder holds no image.
    """
    if where.is_file():
        return {where.stem: where}
    if not where.is_dir():
        raise InputError(f"{role}: {where} is neither a folder nor a file")
    found: dict[str, list[Path]] = {}
    below = [folder.resolve() for folder in apart if where.resolve() in folder.resolve().parents]
    for path in sorted(map(Path, walk_images(where, SUFFIXES))):
        if not below or not set(below).intersection(path.resolve().parents):
            found.setdefault(path.relative_to(where).with_suffix("").as_posix(), []).append(path)
    if not found:
        text = f"{role}: {where} holds no image ({', '.join(sorted(SUFFIXES))})"
        raise InputError("; ".join(filter(None, [text, unread_images(where, SUFFIXES)])))
    for paths in found.values():
        if len(paths) > 1:
            names = ", ".join(path.relative_to(where).as_posix() for path in paths)
            problems.append(f"{role}: one stem for several files: {names}")
    return {stem: paths[0] for stem, paths in found.items() if len(paths) == 1}


def pair_up(
    outputs: Mapping[str, Path], hr: Path | None, lr: Path | None, *, crop: bool = False
) -> tuple[list[Job], list[str]]:
    """Pair outputs with their references by their paths without suffix and check every file's head.

    Args:
        outputs: method to folder, or to one file.
        hr: folder or file of references, or None.
        lr: folder or file of inputs, or None.
        crop: whether different sizes are fine, to be cropped to the common size.

    Returns:
        The jobs that can be scored, in the order of their stems, and one line of text for everything that cannot.

    Raises:
        InputError: a folder that is missing or empty, or files mixed with folders.
    """
    problems: list[str] = []
    places = [*outputs.values(), *(place for place in (hr, lr) if place is not None)]
    single = [place.is_file() for place in places]
    if any(single) and not all(single):
        raise InputError(f"expected either folders everywhere or files everywhere, got {', '.join(map(str, places))}")
    by_method = {method: find_images(place, method, problems, places) for method, place in outputs.items()}
    truths = find_images(hr, "gt", problems, places) if hr else None
    inputs = find_images(lr, "lr", problems, places) if lr else None
    if all(single):  # files that are named one by one belong together whatever they are called
        stem = next(iter(outputs.values())).stem
        by_method = {method: {stem: path} for method, path in outputs.items()}
        truths, inputs = ({stem: place} if place else None for place in (hr, lr))
    wanted: set[str] = set().union(*by_method.values(), truths or ())
    for role, files in [*by_method.items(), ("gt", truths), ("lr", inputs)]:
        if files is not None:
            problems += _missing(role, wanted - set(files), "nothing for")
    if inputs is not None:
        problems += _missing("lr", set(inputs) - wanted, "without partner")
    complete = wanted.intersection(*by_method.values(), *(files for files in (truths, inputs) if files is not None))
    jobs = []
    for stem in sorted(complete):
        job = Job(
            stem,
            {method: files[stem] for method, files in by_method.items()},
            truths[stem] if truths is not None else None,
            inputs[stem] if inputs is not None else None,
        )
        found = _check(job, crop=crop)
        problems += map(job.place, found)
        if not found:
            jobs.append(job)
    return jobs, problems


def _missing(role: str, stems: set[str], words: str) -> list[str]:
    return [f"{role}: {words} {', '.join(sorted(stems))}"] if stems else []


def enlarged_size(lr: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The size to enlarge an input to, so that its pixels lie on those of the outputs and the reference.

    That is a whole multiple of the input wherever one belongs to the sizes, some of which may have been cropped.

    Args:
        lr: height and width of the input.
        sizes: height and width of the outputs, then of the reference.

    Returns:
        Height and width, or None where no size shows what the input shows, as far as sizes can tell.
    """
    fitting = [size for size in sizes if _same_view(lr, size)]
    if not fitting:
        return None
    multiples = [(factor * lr[0], factor * lr[1]) for factor in (round(size[0] / lr[0]) for size in fitting)]
    for size, multiple in zip(fitting, multiples, strict=True):
        if size == multiple:
            return size
    size, (height, width) = fitting[0], multiples[0]
    factor = height // lr[0]
    close = max(abs(size[0] - height), abs(size[1] - width)) < max(factor, 2)
    # Sizes that are all the same and reach beyond the multiple are those of a scale that is not whole.
    beyond = (size[0] > height or size[1] > width) and len(set(sizes)) == 1
    return (height, width) if close and not beyond else size


def _same_view(lr: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether one scale of 1 or more leads from the input to the size, within one pixel of the input."""
    low = max(1.0, *(side / (small + 1) for side, small in zip(size, lr, strict=True)))
    return all(small == 1 or low <= side / (small - 1) for side, small in zip(size, lr, strict=True))


def _check(job: Job, *, crop: bool) -> list[str]:
    problems: list[str] = []
    hr = _header(job.hr, problems, alone=False) if job.hr else None
    lr = _header(job.lr, problems, alone=True) if job.lr else None
    outputs = []
    for path in job.outputs.values():
        sr = _header(path, problems, alone=hr is None)
        outputs.append(sr)
        if sr is None or hr is None:
            continue
        # What sets the two apart comes first: it says more than what is wrong with one of them.
        text = mismatch(sr, hr, crop=crop) or unusable(sr) or unusable(hr)
        if text:
            problems.append(text)
    others = [header for header in (*outputs, hr) if header is not None]
    if lr is not None and not problems:
        sizes = [(header.height, header.width) for header in others]
        if enlarged_size((lr.height, lr.width), sizes) is None:
            found = " and ".join(dict.fromkeys(header.size for header in others))
            problems.append(
                f"{lr.path.name}: expected an input that one scale enlarges to {found} px, got {lr.size}; "
                "it may be turned, cropped, or in the wrong folder"
            )
    return problems


def _header(path: Path, problems: list[str], *, alone: bool) -> ImageHeader | None:
    try:
        header = read_header(path)
    except InputError as error:
        problems.append(str(error))
        return None
    if alone and (text := unusable(header)):
        problems.append(text)
    return header


def describe(problems: Sequence[str], limit: int = 12) -> str:
    """The problems as indented lines, the first ones in full and the number of the others."""
    lines = [f"  {text}" for text in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  and {len(problems) - limit} more")
    return "\n".join(lines)
