"""From a name or a file to a generator that is ready to run."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from morsr.adapters import MoRConfig, Router, load_adapters, read_adapters_header
from morsr.adapters.files import check_base
from morsr.adapters.inject import RouterFactory, add_saved_modules
from morsr.errors import ConfigError, WeightsError, class_at
from morsr.estimators import DegradationEstimator, build_estimator
from morsr.files import expanded
from morsr.hub import fetch, repository_of
from morsr.models.bases import SHIPPED_BASES, Base, load_base, package_weights
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.models.saving import ADAPTERS_FILE, read_description


def find_adapters(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the adapters file behind a shipped preset, a file, or a folder that holds `adapters.safetensors`."""
    path = find_model(name_or_path)
    return path / ADAPTERS_FILE if path.is_dir() else path


def find_model(name_or_path: str | os.PathLike[str], **hub: Any) -> Path:
    """Return the file or folder of a model: a path as it is, a shipped preset, or the download of a hub repository.

    Args:
        name_or_path: file, folder, preset, or hub id such as "user/model" or "user/model@revision".
        hub: revision, cache_dir, token, local_files_only, as `huggingface_hub.snapshot_download` takes them.

    Raises:
        WeightsError: there is none; the message says what was looked for.
    """
    path, name = expanded(name_or_path), os.fspath(name_or_path)
    shipped = name in SHIPPED_BASES
    if path.exists() and not (shipped and path.is_dir() and not (path / ADAPTERS_FILE).exists()):  # as experiments/tiny
        return path
    if shipped:
        return package_weights(name) / ADAPTERS_FILE
    if repository_of(name) is not None and not name.endswith((".safetensors", ".ckpt")):
        try:
            return fetch(name, ["*.safetensors", "*.json", "*.txt"], **hub)
        except WeightsError as error:
            raise WeightsError(f"{name}: no such file or folder here, and not on the hub ({error})") from error
    raise WeightsError(
        f"{name}: no such adapters file or folder, and no shipped preset has this name ({', '.join(SHIPPED_BASES)})"
    )


def load_generator(
    name_or_path: str | os.PathLike[str] = "tiny",
    *,
    base: Base | str | os.PathLike[str] | None = None,
    prompt: str | None = None,
    estimator: DegradationEstimator | str | None = None,
    router: RouterFactory | str | None = None,
    **hub: Any,
) -> OneStepGenerator:
    """Load a generator with its base, estimator and adapters, in evaluation mode, on the CPU in float32.

    Arguments and errors are those of `morsr.restoring.Restorer.from_pretrained`.
    """
    path = find_model(name_or_path, **hub)
    prompts = None if prompt is None else {"clean": prompt}
    given: dict[str, Any] = {"base": base, "prompts": prompts, "estimator": estimator, "router": router}
    described = None
    if path.is_dir():
        described = read_description(path)
        if described is not None and described["adapters"] is None:
            return _build(path, None, described, given).eval()
        path = path / ADAPTERS_FILE
    if path.suffix == ".ckpt":
        return _from_checkpoint(path, given)
    header = read_adapters_header(path)
    extra = described or _described(path, header.get("extra"))
    generator = _build(path, None, extra, given, header["attached"])
    generator.adapters = load_adapters(path, generator.base, name="generator", router=_router(path, extra, router))
    expected, found = generator.adapters.router.num_scores, generator.estimator.dim if generator.estimator else 0
    if generator.adapters.is_routed and found != expected:
        kind = type(generator.estimator).__name__
        raise ConfigError(f"estimator: the model's router takes {expected} scores, {kind} gives {found}")
    return generator.eval()


def _described(path: Path, extra: Any) -> Mapping[str, Any]:
    missing = [key for key in ("estimator", "one_step", "base") if not isinstance(extra, Mapping) or key not in extra]
    if missing:
        raise WeightsError(
            f"{path}: does not say how to run it ({', '.join(missing)} missing); expected a file saved by training"
        )
    return extra


def _build(
    path: Path,
    config: MoRConfig | None,
    extra: Mapping[str, Any],
    given: Mapping[str, Any],
    cached: Mapping[str, Tensor] | None = None,
) -> OneStepGenerator:
    """A fresh generator: what the user gave, else what the file describes; prompts that are cached need no encoder."""
    if extra.get("decoder"):
        raise WeightsError(f"{path}: it was trained with a decoder apart from its base's, which only morsr 0.1 runs")
    try:
        one_step = OneStepConfig(**extra["one_step"])
    except (KeyError, TypeError, ConfigError) as error:
        raise WeightsError(f"{path}: its description cannot be read ({error})") from error
    estimator = _estimator(path, extra["estimator"], given["estimator"])
    text = extra.get("prompt")
    prompts = given["prompts"] or cached or extra.get("prompts") or (None if text is None else {"clean": text})
    base = _base(given["base"], extra["base"], prompts)
    router = _router(path, extra, given["router"])
    return OneStepGenerator(base, estimator, adapters=config, router=router, one_step=one_step)


def _base(given: Any, stored: Any, prompts: Any) -> Base:
    """The user's own base or its class, else the base that they or the file name; a file's class is not imported."""
    named = given or stored
    if isinstance(named, str) and re.fullmatch(r"\w+(\.\w+)+", named) and not expanded(named).exists():
        if given is None:
            raise WeightsError(f"this model needs the base {named!r}: give it, as in --base {named}")
        try:
            named = class_at(named, "base", Base)()
        except TypeError as error:
            raise ConfigError(f"base: {named} is called without arguments ({error}); give it defaults") from error
    return load_base(named, prompts=prompts)


def _router(path: Path, extra: Mapping[str, Any], given: RouterFactory | str | None) -> RouterFactory:
    """The class that the user gives; a file only says that it needs one, and nothing is imported because it says so."""
    if given is None and (wanted := extra.get("router")):
        raise WeightsError(f"{path}: this model needs the router {wanted!r}: give it, as in --router {wanted}")
    return class_at(given, "router", Router) if isinstance(given, str) else given or Router


def _estimator(path: Path, spec: Any, given: DegradationEstimator | str | None) -> DegradationEstimator | None:
    """What a file describes, unless the user gives another, its class, or the place of its weights."""
    if isinstance(given, DegradationEstimator) or (spec is None and given is None):
        return given  # type: ignore[return-value]
    if spec is not None and not isinstance(spec, Mapping):  # a name would be imported
        raise WeightsError(f"{path}: its description cannot be read (estimator {spec!r})")
    spec = spec or {}
    kind, args = spec.get("kind"), spec.get("args", {})
    if given is not None:
        if kind == "clip" and (Path(given).is_dir() or repository_of(given) is not None):
            return build_estimator(spec, model=given)
        if kind == "learned" and expanded(given).is_file():
            return build_estimator(spec, weights=given)
        return build_estimator(given, **(args if given == kind else {}))
    try:
        return build_estimator(spec)
    except (KeyError, TypeError, WeightsError) as error:
        where = {"clip": "; --estimator FOLDER_OR_ID names CLIP's place", "learned": "; --estimator FILE names it"}
        raise WeightsError(f"{path}: {error}{where.get(kind, '')}") from error


def read_checkpoint(path: str | os.PathLike[str], *, map_location: Any = "cpu", whole: bool = True) -> dict[str, Any]:
    """Read a training checkpoint, a local file of tensors and plain values; nothing in it is executed.

    Args:
        path, map_location: as for `torch.load`.
        whole: compare every byte with the checksums first; without that, tensors are not read until they are used.

    Raises:
        WeightsError: missing, damaged, cut short, or with objects that would have to be unpickled.
    """
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such checkpoint; expected a local file")
    try:
        if whole:
            check_sums(path)
        found = torch.load(path, map_location=map_location, weights_only=True, mmap=not whole)
    except Exception as error:  # a damaged archive surfaces as any of half a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise WeightsError(f"{path}: not a whole checkpoint ({reason}); take an earlier one") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise WeightsError(f"{path}: expected a checkpoint of Lightning, got a file without a state_dict")
    if any(key.startswith("generator.backbone.") for key in found["state_dict"]):
        raise WeightsError(f"{path}: a checkpoint of morsr 0.1, which this release cannot resume; run it by 0.1")
    return found


def check_sums(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where a byte of a checkpoint's archive does not fit its checksum."""
    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} is damaged")


def _from_checkpoint(path: Path, given: Mapping[str, Any]) -> OneStepGenerator:
    checkpoint = read_checkpoint(path)
    if (described := checkpoint.get("morsr")) is None:
        raise WeightsError(f"{path}: expected a checkpoint saved by `morsr fit`")
    config, extra = MoRConfig.from_dict(described["adapters"]), _described(path, described.get("extra"))
    generator = _build(path, config, extra, given, described.get("prompts"))
    check_base(path, described, generator.base)
    prefix = "generator."
    # A checkpoint also holds the networks that only training needs: the score network's set and the discriminator.
    state = {
        key.removeprefix(prefix): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(prefix) and ".sets.score." not in key
    }
    if generator.adapters is not None:
        add_saved_modules(generator.base, generator.adapters, described.get("saved", ()))
    # A run that averaged its weights was validated with the average, which is also what its adapters files hold.
    average = checkpoint.get("callbacks", {}).get("AdapterEMA", {}).get("average", {})
    state |= {key: value for key, value in average.items() if key in state}
    trained = {name for name, parameter in generator.named_parameters() if parameter.requires_grad}
    try:
        missing, unexpected = generator.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise WeightsError(f"{path}: its tensors have other shapes than the adapters that it describes") from error
    if unexpected or trained.intersection(missing):
        raise WeightsError(f"{path}: its tensors do not fit the adapters that it describes")
    return generator.eval()
