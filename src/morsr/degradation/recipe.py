"""Degradation recipes: which distributions the parameters are drawn from, their files, and the drawing."""

from __future__ import annotations

import difflib
import hashlib
import math
from dataclasses import dataclass, field, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from morsr.degradation.keys import uniforms
from morsr.degradation.parameters import DegradationParameters, FinalParameters
from morsr.degradation.stages import BlurRecipe, SingleRecipe, StageRecipe, between, check_numbers, choose, second_order
from morsr.errors import ConfigError, InputError, class_at


@dataclass(frozen=True, kw_only=True)
class DegradationRecipe:
    """The whole second-order degradation as distributions; `sample` draws one set of parameters per image.

    A subclass with another `sample` is a recipe too; it is named by its import path.

    Args:
        name: what to call it; not part of the hash.
        first, second: the two orders of blur, resize, noise and JPEG; the defaults are Real-ESRGAN's.
        final_sinc_probability: of the last sinc filter, with a cut-off from pi/3 to pi.
        jpeg_last_probability: of the second JPEG coming after the resize to the LR size, not before it.
        sharpen: degrade an unsharp-masked HR image, as Real-ESRGAN does (its targets are sharpened too).
        mix: other recipes and the share of the images that takes each of them, such as {camera: 0.4}; names or paths
            in a file. `sharpen` is that of this recipe.
        single: images that are degraded in one way only; their share is taken before the mix.

    Raises:
        ConfigError: a range that is reversed or out of bounds, probabilities that do not sum to 1, shares that exceed
            1, or a mix within a mix.

    Source: Real-ESRGAN (Wang et al. 2021), options of train_realesrnet_x4plus; OSEDiff, PiSA-SR and S3Diff for the
        presets of their names.
    """

    name: str = "realesrgan"
    first: StageRecipe = field(default_factory=StageRecipe)
    second: StageRecipe = field(default_factory=second_order)
    final_sinc_probability: float = 0.8
    jpeg_last_probability: float = 0.5
    sharpen: bool = False
    mix: Any = ()
    single: SingleRecipe = field(default_factory=SingleRecipe)

    def __post_init__(self) -> None:
        check_numbers(self, final_sinc_probability=(0, 1), jpeg_last_probability=(0, 1))
        if not isinstance(self.mix, (dict, list, tuple)):
            raise ConfigError(f"mix: expected recipes with their shares, got {self.mix!r}")
        mix = tuple((self.load(other, plain=True), float(share)) for other, share in dict(self.mix).items())
        shares = [share for _, share in mix]
        if mix and not (min(shares) > 0 and sum(shares) <= 1 + 1e-9):
            raise ConfigError(f"mix: expected shares above 0, of at most 1 together, got {shares}")
        if any(getattr(other, "mix", ()) for other, _ in mix):
            raise ConfigError("mix: expected plain recipes, got a mix")
        object.__setattr__(self, "mix", mix)

    @classmethod
    def load(cls, recipe: Any, *, plain: bool = False) -> Any:
        """A recipe by a preset's name, the path of a .yaml file, or the import path of a class such as "mine.Rain".

        Args:
            recipe: which; whatever has a `sample` that draws parameters by keys is returned as it is. What a file
                leaves out keeps its default.
            plain: refuse a mix before the recipes that it names are read, which may lead back here.

        Raises:
            ConfigError: no such recipe, a file that cannot be read, an unknown key or a wrong value.
        """
        if hasattr(recipe, "sample"):
            return recipe
        import yaml

        source, shipped = str(recipe), str(recipe) in preset_names()
        if not shipped and not source.endswith((".yaml", ".yml")):
            return _imported(source)
        path = resources.files("morsr.degradation") / "recipes" / f"{source}.yaml" if shipped else Path(source)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"recipe {source}: cannot be read ({str(error).splitlines()[0]})") from error
        if isinstance(values, dict):
            values = {"name": Path(source).stem, **values}
            if plain and "mix" in values:
                raise ConfigError(f"mix: expected plain recipes, got a mix ({source})")
        return _build(DegradationRecipe, values, f"recipe {source}")

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that change with any setting but the name."""
        return hashlib.sha256(repr(replace(self, name="")).encode()).hexdigest()[:16]

    def sample(self, keys: Tensor) -> DegradationParameters:
        """Draw one full set of parameters per image, on the CPU.

        Args:
            keys: (B,) int64, one key per image; a set depends on its own key alone (see `sample_keys`).

        Raises:
            InputError: keys that are not a vector of int64.
        """
        if keys.dtype != torch.int64 or keys.ndim != 1 or len(keys) == 0:
            raise InputError(f"keys: expected an int64 tensor (B,), got {keys.dtype} {tuple(keys.shape)}")
        keys = keys.cpu()
        # Every draw has a fixed number, so that a change of one setting leaves the other draws as they were.
        uniform = uniforms(keys, 48)
        sinc = BlurRecipe(probability=self.final_sinc_probability, sinc_probability=1.0).draw(uniform[:, 32:41])
        final = FinalParameters(
            blur=replace(sinc, cutoff=between(uniform[:, 40], (math.pi / 3, math.pi))),
            resize_mode=choose(uniform[:, 41], (1 / 3,) * 3),
            jpeg_last=uniform[:, 42] < self.jpeg_last_probability,
        )
        parts = [other.sample(keys) for other, _ in self.mix]
        parts.append(
            DegradationParameters(
                key=keys,
                sharpen=torch.zeros_like(keys, dtype=torch.bool),
                first=self.first.draw(uniform[:, :16]),
                second=self.second.draw(uniform[:, 16:32]),
                final=final,
            )
        )
        taken = choose(uniform[:, 47], tuple(share for _, share in self.mix) + (1.0,))  # the last is this recipe
        parts.append(self.single.draw(keys, uniform[:, 44:47]))
        taken = torch.where(uniform[:, 43] < self.single.share, len(self.mix) + 1, taken)
        drawn = DegradationParameters.concatenate(parts)[torch.arange(len(keys)) + len(keys) * taken]
        return replace(drawn, sharpen=torch.full_like(drawn.sharpen, self.sharpen))


def preset_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = resources.files("morsr.degradation") / "recipes"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def _imported(path: str) -> Any:
    if "." not in path:
        near = difflib.get_close_matches(path, preset_names(), 1)
        guess = f"did you mean {near[0]}?" if near else f"presets are {', '.join(preset_names())}"
        raise ConfigError(f"recipe: no preset, .yaml or import path {path!r}; {guess}")
    made = class_at(path, "recipe")()
    if not hasattr(made, "sample"):
        raise ConfigError(f"recipe {path}: expected a class with `sample`, such as a subclass of DegradationRecipe")
    return made


def _build(kind: Any, values: Any, where: str) -> Any:
    """Make a dataclass from the mappings of a file; `where` names the part in errors."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {values!r}")
    known = get_type_hints(kind)
    if unknown := [str(key) for key in values if key not in known]:
        raise ConfigError(f"{where}: unknown key {unknown[0]}; expected {', '.join(known)}")
    settings = {}
    for key, value in values.items():
        wanted = known[key]
        if wanted in (bool, str) and not isinstance(value, wanted):
            raise ConfigError(f"{where}: {key}: expected {wanted.__name__}, got {value!r}")
        settings[key] = _build(wanted, value, f"{where}: {key}") if is_dataclass(wanted) else value
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
