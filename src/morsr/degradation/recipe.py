"""Degradation recipes: which distributions the parameters are drawn from, and the drawing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morsr.degradation.keys import uniforms
from morsr.degradation.parameters import DegradationParameters, FinalParameters
from morsr.degradation.stages import (
    BlurRecipe,
    NoiseRecipe,
    ResizeRecipe,
    StageRecipe,
    between,
    check_probability,
    choose,
    second_order,
)
from morsr.errors import ConfigError, InputError
from morsr.functional.corrupt import RESIZE_MODES

ENGINES = ("torch", "basicsr")


@dataclass(frozen=True, kw_only=True)
class DegradationRecipe:
    """The whole second-order degradation as distributions; `sample` draws one set of parameters per image.

    Args:
        name: what to call it; not part of the hash.
        first, second: the two orders of blur, resize, noise and JPEG; the defaults are Real-ESRGAN's.
        final_sinc_probability: of the last sinc filter, with a cut-off from pi/3 to pi.
        jpeg_last_probability: of the second JPEG coming after the resize to the LR size, not before it.
        sharpen: degrade an unsharp-masked HR image, as Real-ESRGAN does (its targets are sharpened too).
        engine: "torch", our own operators; or "basicsr", the reference operators, slower.
        mixed_with: another recipe, which a share of the images takes in place of this one, or several; in a YAML file
            its name, its path or its settings, or a list of such. Sharpening and engine are those of this recipe.
        mixed_share: the share of images that take `mixed_with`; of several recipes, one share each.

    Raises:
        ConfigError: a range that is reversed or out of bounds, probabilities that do not sum to 1, shares that
            do not go with the recipes or exceed 1 together, or a mix within a mix.

    Source: Real-ESRGAN (Wang et al. 2021), options of train_realesrnet_x4plus; OSEDiff, PiSA-SR and S3Diff for the
        presets of their names.
    """

    name: str = "realesrgan"
    first: StageRecipe = field(default_factory=StageRecipe)
    second: StageRecipe = field(default_factory=second_order)
    final_sinc_probability: float = 0.8
    jpeg_last_probability: float = 0.5
    sharpen: bool = False
    engine: str = "torch"
    mixed_with: DegradationRecipe | tuple[DegradationRecipe, ...] | None = None
    mixed_share: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        check_probability("final_sinc_probability", self.final_sinc_probability)
        check_probability("jpeg_last_probability", self.jpeg_last_probability)
        if not isinstance(self.sharpen, bool):
            raise ConfigError(f"sharpen: expected true or false, got {self.sharpen!r}")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}")
        self._check_mix()

    def _check_mix(self) -> None:
        """Keep the other recipes and their shares as two tuples, empty for a plain recipe."""
        others = _listed(self.mixed_with, nothing=None)
        shares = tuple(check_probability("mixed_share", share) for share in _listed(self.mixed_share, nothing=0))
        if len(others) != len(shares) or None in others or 0 in shares:
            raise ConfigError(
                "mixed_with, mixed_share: expected both, a recipe and its share above 0 or as many of each, or neither"
            )
        others = tuple(DegradationRecipe.load(other, plain=True) for other in others)
        if sum(shares) > 1 + 1e-9:
            raise ConfigError(f"mixed_share: expected shares of at most 1 together, got {list(shares)}")
        for other in others:
            if other.mixed_with:
                raise ConfigError(f"mixed_with: expected plain recipes, got a mix ({other.name})")
        object.__setattr__(self, "mixed_with", others)
        object.__setattr__(self, "mixed_share", shares)

    @property
    def mixes(self) -> tuple[tuple[DegradationRecipe, float], ...]:
        """The other recipes of a mix, each with its share of the images; empty for a plain recipe."""
        others: Any = self.mixed_with
        shares: Any = self.mixed_share
        return tuple(zip(others, shares, strict=True))

    # ---------------------------------------------------------------------------------------- making and naming

    @classmethod
    def from_preset(cls, name: str) -> DegradationRecipe:
        """A recipe that comes with the package, one of `preset_names()`.

        Raises:
            ConfigError: no preset has this name.
        """
        if name not in preset_names():
            raise ConfigError(
                f"recipe: expected one of {', '.join(preset_names())}, or the path of a .yaml; got {name!r}"
            )
        text = (resources.files("morsr.degradation") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        return cls._from_text(text, name)

    @classmethod
    def from_yaml(cls, path: str | Path, *, plain: bool = False) -> DegradationRecipe:
        """A recipe from a YAML file with the fields of this class; what is left out keeps its default.

        Args:
            path: the file.
            plain: refuse a mix before the recipes that it names are read, which may lead back here.

        Raises:
            ConfigError: the file cannot be read, has an unknown key or a wrong value.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {path}: cannot be read ({error})") from error
        return cls._from_text(text, str(path), plain=plain)

    @classmethod
    def load(cls, recipe: DegradationRecipe | str | Path, *, plain: bool = False) -> DegradationRecipe:
        """A recipe from itself, a preset's name, or the path of a YAML file; `plain`: see `from_yaml`."""
        if isinstance(recipe, DegradationRecipe):
            return recipe
        if str(recipe).endswith((".yaml", ".yml")):
            return cls.from_yaml(recipe, plain=plain)
        return cls.from_preset(str(recipe))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DegradationRecipe:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown key or a wrong value.
        """
        return _build(cls, values, "recipe")

    @classmethod
    def _from_text(cls, text: str, source: str, *, plain: bool = False) -> DegradationRecipe:
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"recipe {source}: not valid YAML ({str(error).splitlines()[0]})") from error
        if plain and isinstance(values, dict) and "mixed_with" in values:
            raise ConfigError(f"mixed_with: expected plain recipes, got a mix ({source})")
        named = {"name": Path(source).stem, **values} if isinstance(values, dict) else values
        return _build(cls, named, f"recipe {source}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers, ready for YAML or JSON."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        del values["mixed_with"], values["mixed_share"]
        if self.mixes:
            values["mixed_with"] = _one_or_all([recipe.to_dict() for recipe, _ in self.mixes])
            values["mixed_share"] = _one_or_all([share for _, share in self.mixes])
        return values

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that change with any setting but the name."""
        values = {key: value for key, value in self.to_dict().items() if key != "name"}
        if self.mixes:
            values["mixed_with"] = _one_or_all([recipe.hash for recipe, _ in self.mixes])  # without their names
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    # -------------------------------------------------------------------------------------------------- drawing

    def sample(self, keys: Tensor | int, *, generator: torch.Generator | None = None) -> DegradationParameters:
        """Draw one full set of parameters per image, on the CPU.

        Args:
            keys: (B,) int64, one key per image; a set depends on its own key alone (see `sample_keys`). Or a
                number of images, whose keys come from the generator.
            generator: where the keys come from if only a number is given; None takes torch's global one.

        Raises:
            InputError: keys that are not a vector of int64, or a number below 1, or keys and a generator.
        """
        if isinstance(keys, int) and not isinstance(keys, bool):
            if keys < 1:
                raise InputError(f"keys: expected at least one image, got {keys}")
            device = "cpu" if generator is None else generator.device
            keys = torch.randint(0, 2**63 - 1, (keys,), generator=generator, device=device)
        elif generator is not None:
            raise InputError("sample: expected keys or a generator, got both; the generator would have no effect")
        if not isinstance(keys, Tensor) or keys.dtype != torch.int64 or keys.ndim != 1 or len(keys) == 0:
            what = f"{keys.dtype} {tuple(keys.shape)}" if isinstance(keys, Tensor) else type(keys).__name__
            raise InputError(f"keys: expected a number of images or an int64 tensor (B,), got {what}")
        keys = keys.cpu()
        # Every draw has a fixed number, so that a change of one setting leaves the other draws as they were.
        uniform = uniforms(keys, 48)
        final = BlurRecipe(probability=self.final_sinc_probability, sinc_probability=1.0).draw(uniform[:, 32:41])
        cutoff = between(uniform[:, 40], (math.pi / 3, math.pi))
        parameters = DegradationParameters(
            key=keys,
            sharpen=torch.full_like(keys, self.sharpen, dtype=torch.bool),
            first=self.first.draw(uniform[:, :16]),
            second=self.second.draw(uniform[:, 16:32]),
            final=FinalParameters(
                blur=dataclasses.replace(final, cutoff=cutoff),
                resize_mode=choose(uniform[:, 41], (1 / len(RESIZE_MODES),) * len(RESIZE_MODES)),
                jpeg_last=uniform[:, 42] < self.jpeg_last_probability,
            ),
        )
        if not self.mixes:
            return parameters
        mixed = [dataclasses.replace(recipe, sharpen=self.sharpen).sample(keys) for recipe, _ in self.mixes]
        edges = torch.tensor([share for _, share in self.mixes], dtype=torch.float64).cumsum(0)
        taken = torch.searchsorted(edges, uniform[:, 47].contiguous(), right=True)  # one past the others: this recipe
        drawn = DegradationParameters.concatenate([*mixed, parameters])
        return drawn[torch.arange(len(keys)) + len(keys) * taken]


def _listed(value: Any, *, nothing: Any) -> tuple[Any, ...]:
    """A setting that may be one value or several as a tuple; empty where it is `nothing`."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return () if value == nothing else (value,)


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def preset_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = resources.files("morsr.degradation") / "recipes"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


_PARTS: dict[type, dict[str, type]] = {
    DegradationRecipe: {"first": StageRecipe, "second": StageRecipe, "mixed_with": DegradationRecipe},
    StageRecipe: {"blur": BlurRecipe, "resize": ResizeRecipe, "noise": NoiseRecipe},
}


def _setting(part: type | None, key: str, value: Any, source: str, path: tuple[str, ...]) -> Any:
    """The value of one key: a part of its own where it has one, recipes by name or by their settings, else as it is."""
    if isinstance(value, list) and (part is None or key == "mixed_with"):
        return tuple(_setting(part, key, entry, source, path) for entry in value)
    if part is None or (key == "mixed_with" and isinstance(value, str)):
        return value
    return _build(part, value, source, (*path, key))


def _build(kind: type, values: Any, source: str, path: tuple[str, ...] = ()) -> Any:
    """Make a recipe or a part of one; `source` and the keys that lead to the part name it in errors."""
    place = f"{source}: {'.'.join(path)}: " if path else f"{source}: "
    if not isinstance(values, dict):
        raise ConfigError(f"{place}expected a mapping of settings, got {values!r}")
    known = {entry.name for entry in dataclasses.fields(kind)}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ConfigError(f"{place}unknown key {', '.join(unknown)}; expected {', '.join(sorted(known))}")
    parts = _PARTS.get(kind, {})
    settings = {key: _setting(parts.get(key), key, value, source, path) for key, value in values.items()}
    try:
        return kind(**settings)
    except ConfigError as error:  # its message names the part, and not which of the two orders it is of
        raise ConfigError(f"{source}: {''.join(f'{key}.' for key in path[:1])}{error}") from error
