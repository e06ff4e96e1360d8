"""Validation and test pairs of single images: degraded once on the CPU by a recipe, and kept on disk ever after.

LR images are stored as 8-bit PNG with their true parameters beside them as JSON, in a folder named by the recipe's hash
and by what the degradation code makes of a probe, so that a change of either makes them anew.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from morsr.data.images import Source, distinct_names, list_images, load_image, source_root
from morsr.data.manifests import file_hash
from morsr.data.pairs import SCALE, Pair, crop_to_multiple, some, to_tensor
from morsr.errors import ConfigError, InputError
from morsr.files import atomic_path, write_text


class DegradedImage(NamedTuple):
    """An HR file and the LR image in the cache that was made from it; see `Pair` for the fields of the same names."""

    stem: str
    image: str
    hr: str
    lr: str
    seed: int
    key: int
    multiple: int
    largest: int | None

    def load(self) -> Pair:
        """Read both images and the parameters."""
        from morsr.degradation import DegradationParameters

        hr = crop_to_multiple(load_image(self.hr), self.multiple, largest=self.largest)
        parameters = DegradationParameters.from_jsonl(Path(self.lr).with_suffix(".json").read_text(encoding="utf-8"))
        return Pair(self.stem, load_image(self.lr), hr, parameters, self.seed, self.image, self.key)


def embedded_benchmark(
    seeds: Iterable[int] = range(5),
    recipe: Any = "realesrgan",
    *,
    multiple: int = 16,
    cache_dir: str | Path | None = None,
) -> list[Pair]:
    """The benchmark that needs no data: scikit-image's four held-out photographs, degraded with fixed seeds.

    Args:
        seeds: one pair per photograph and seed.
        recipe: a DegradationRecipe, a preset's name or a YAML file.
        multiple: HR sides are cropped to multiples of this.
        cache_dir: where LR images are kept; None takes the user's cache folder.

    Returns:
        Pairs ordered by photograph, then seed, with stems such as `coffee_s3`.
    """
    return degraded_pairs(["skimage:eval"], seeds, recipe, multiple=multiple, cache_dir=cache_dir)


def degraded_pairs(
    sources: Sequence[Source], seeds: Iterable[int] = (0,), recipe: Any = "realesrgan", **settings: Any
) -> list[Pair]:
    """As `degraded_images`, with all pixels in memory."""
    return [image.load() for image in degraded_images(sources, seeds, recipe, **settings)]


def degraded_images(
    sources: Sequence[Source],
    seeds: Iterable[int] = (0,),
    recipe: Any = "realesrgan",
    *,
    multiple: int = 64,
    largest: int | None = None,
    scale: int = SCALE,
    engine: str | None = None,
    cache_dir: str | Path | None = None,
    skipped: dict[str, str] | None = None,
) -> list[DegradedImage]:
    """Degrade the images of sources, or find what an earlier call has made.

    An image is called by its stem; images that share one are called by their paths in the source (`day/1`), and so are
    their degradations.

    Args:
        sources: lists of HR images.
        seeds: one pair per image and seed.
        recipe, engine: see `load_recipe`.
        multiple, largest: how the HR image is cropped, see `crop_to_multiple`.
        scale: HR pixels per LR pixel.
        cache_dir: folder of the cache; None takes the user's.
        skipped: files that cannot be used are noted here by path; None raises for the first one.

    Raises:
        InputError: an image cannot be used and `skipped` is None; no image is left; the cache cannot be written.
    """
    recipe = load_recipe(recipe, engine)
    seeds = list(seeds)
    folder = cache_folder(cache_dir) / f"{recipe.hash}-{_behaviour(recipe, recipe.hash, recipe.engine, scale)}"
    planned: list[list[DegradedImage]] = []
    bad: dict[str, str] = {}
    roots = {path: source_root(source) for source in sources for path in list_images(source).paths}
    for path, image in distinct_names(roots).items():
        try:
            content = file_hash(path)
        except OSError as error:
            bad[path] = f"{path}: cannot be read ({error})"
            continue
        rows = []
        for seed in seeds:
            key = image_key(image, seed)
            stem = f"{image}_s{seed}" if len(seeds) > 1 else image
            made_of = f"{content} {key} {scale} {multiple} {largest}"
            digest = hashlib.blake2b(made_of.encode(), digest_size=8).hexdigest()
            lr = str(folder / f"{Path(path).stem}-{digest}.png")
            rows.append(DegradedImage(stem, image, path, lr, seed, key, multiple, largest))
        planned.append(rows)
    missing = [rows for rows in planned if not all(_usable(row.lr) for row in rows)]
    for rows in tqdm(missing, desc="LR images, made once", unit="image", disable=len(missing) < 8, leave=False):
        path = rows[0].hr
        try:
            hr = crop_to_multiple(load_image(path), multiple, largest=largest)
        except InputError as error:
            bad[path] = str(error) if path in str(error) else f"{path}: {error}"
            continue
        _make(hr, rows, recipe, scale)
    if bad and skipped is None:
        raise InputError(next(iter(bad.values())))
    if skipped is not None:
        skipped.update(bad)
    found = [row for rows in planned for row in rows if row.hr not in bad]
    if not found:
        raise InputError(f"no image of {some(str(source) for source in sources)} can be used: {some(bad.values())}")
    return found


def image_key(stem: str, seed: int) -> int:
    """Key of the degradation of an image: depends on its name and a seed, not on the images around it."""
    from morsr.degradation.keys import sample_keys

    name = stem.encode("utf-8", "surrogateescape")  # the bytes of names that are no UTF-8
    number = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)
    return int(sample_keys(seed, 0, torch.tensor([number]))[0])


def load_recipe(recipe: Any, engine: str | None = None, *, sharpen: bool | None = None) -> Any:
    """A DegradationRecipe from itself, a preset's name or a YAML file.

    Args:
        recipe: which.
        engine: "device" (ours) or "basicsr" (the reference operators); None leaves the recipe's own.
        sharpen: override the recipe's own setting.

    Raises:
        ConfigError: an unknown recipe or engine.
    """
    from morsr.degradation import DegradationRecipe

    loaded = DegradationRecipe.load(recipe)
    if engine not in (None, "device", "basicsr"):
        raise ConfigError(f"engine: expected 'device' or 'basicsr', got {engine!r}")
    if engine is not None:
        loaded = replace(loaded, engine="torch" if engine == "device" else "basicsr")
    return loaded if sharpen is None else replace(loaded, sharpen=sharpen)


def apply_recipe(hr: Tensor, parameters: Any, recipe: Any, *, scale: int = SCALE) -> Tensor:
    """Degrade (B, 3, H, W) in [0, 1] by drawn parameters, with the recipe's engine."""
    if recipe.engine == "basicsr":
        from morsr.degradation.reference import apply_reference

        return apply_reference(hr, parameters, scale=scale)
    from morsr.degradation import apply

    return apply(hr, parameters, scale=scale)


def _make(hr: np.ndarray, rows: list[DegradedImage], recipe: Any, scale: int) -> None:
    for row in rows:
        parameters = recipe.sample(torch.tensor([row.key]))
        made = apply_recipe(to_tensor(hr)[None].float() / 255, parameters, recipe, scale=scale)
        lr = made[0].mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
        text = parameters.to_jsonl(extra=[{"image": row.image, "seed": row.seed, "recipe": recipe.name}])
        path = Path(row.lr)
        try:
            # the image last: it tells that both are there
            write_text(path.with_suffix(".json"), text)
            with atomic_path(path) as part:
                Image.fromarray(lr).save(part, format="PNG")
        except OSError as error:
            raise InputError(
                f"{path.parent}: cannot be written ({error}); set cache_dir to a folder that can"
            ) from error


def _usable(path: str) -> bool:
    if not (os.path.isfile(path) and os.path.isfile(Path(path).with_suffix(".json"))):
        return False
    try:
        load_image(path)
    except InputError:
        return False  # damaged since; made anew
    return True


@functools.lru_cache(maxsize=16)
def _behaviour(recipe: Any, digest: str, engine: str, scale: int) -> str:
    """Eight digits that change when the degradation code turns the same parameters into other pixels."""
    rows = torch.linspace(0, 1, 16 * scale)
    probe = torch.stack([rows[:, None] * rows, (9 * rows[:, None] * rows).sin().abs(), (rows[:, None] > rows).float()])
    parameters = recipe.sample(torch.arange(6))
    pixels = apply_recipe(probe.expand(6, -1, -1, -1), parameters, recipe, scale=scale).mul(255).round().byte()
    return hashlib.blake2b(pixels.numpy().tobytes(), digest_size=4).hexdigest()


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where LR images are kept: the folder given, $MORSR_CACHE, the user's cache; .cache if that is read-only."""
    if cache_dir is not None:
        return Path(cache_dir)
    if named := os.environ.get("MORSR_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        user = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        user = Path.home() / "Library" / "Caches"
    else:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    existing = next(folder for folder in (user, *user.parents) if folder.exists())
    return (user if os.access(existing, os.W_OK) else Path(".cache")) / "morsr" / "degraded"
