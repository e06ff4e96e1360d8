"""The mean of adapter files: of several runs, or of the last checkpoints of one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from morsr.adapters.checkpoint import FORMAT, comparable_settings, read_adapters_header, read_tensors
from morsr.adapters.config import MoRConfig
from morsr.adapters.same_base import same_print
from morsr.errors import ConfigError, InputError, WeightsError
from morsr.files import save_tensors


def average_adapters(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an adapter file whose tensors are the weighted mean of those of others.

    This is of use for files that began at the same weights: they lie in one basin, and what an adversarial loss makes
    swing from step to step averages out. Files of unrelated runs give nonsense: their ranks stand in other orders.

    Args:
        paths: at least two adapter files of one base, with the same layers and settings; header, extra values and
            attached tensors are those of the first.
        output: the file to write, .safetensors and none of `paths`.
        weights: one positive number per file, in any unit; equal by default.
        dtype: to store the ranks in, as torch.float16; that of the first file by default. The mean is taken in float64.

    Raises:
        ConfigError: fewer than two files, or weights that do not fit them, or a dtype that is no floating-point type
            or too small for the ranks.
        InputError: an output of another suffix, or one that would overwrite an input.
        WeightsError: an unreadable file, one of another base, other layers or other settings, or one made to run with
            another timestep, estimator, decoder or prompt. Nothing is written.

    Source: model soups (Wortsman et al. 2022, arXiv 2203.05482).
    """
    if len(paths) < 2:
        raise ConfigError(f"expected at least two adapter files to average, got {len(paths)}")
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths) or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"weights: expected {len(paths)} positive numbers, one per file, got {weights}")
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(f"dtype: expected a floating-point type, got {dtype}")
    target = Path(output).expanduser()
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: expected an output whose name ends in .safetensors")
    if target.resolve() in {Path(path).resolve() for path in paths}:
        raise InputError(f"{target}: the output would overwrite an input")
    headers = [read_adapters_header(path) for path in paths]
    for path, header in zip(paths[1:], headers[1:], strict=True):
        for what, first, other in _differing(headers[0], header):
            raise WeightsError(f"{path}: cannot be averaged with {paths[0]}: {what} is {other}, there {first}")
    total = sum(weights)
    mean: dict[str, torch.Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for number, (path, header, weight) in enumerate(zip(paths, headers, weights, strict=True)):
        for key, value in read_tensors(path, header).items():
            if key.startswith("attached."):
                if number == 0:
                    kinds[key], mean[key] = value.dtype, value
                elif key in mean and not _alike(mean[key], value):
                    raise WeightsError(
                        f"{path}: cannot be averaged with {paths[0]}: other numbers are attached as "
                        f"{key.removeprefix('attached.')}; average files that were trained under one prompt"
                    )
                continue
            kinds.setdefault(key, dtype if dtype is not None and key.startswith("layers.") else value.dtype)
            part = value.double() * (weight / total)
            mean[key] = mean[key] + part if key in mean else part
    tensors = {
        key: (value if kinds[key].is_floating_point else value.round()).to(kinds[key]) for key, value in mean.items()
    }
    if lost := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise ConfigError(f"dtype: {dtype} cannot hold {lost[0]}; store torch.bfloat16 or torch.float32")
    header = {key: value for key, value in headers[0].items() if key != "format_version"}
    names = [Path(path).name for path in paths]
    header["extra"] = {**header["extra"], "averaged": {"files": names, "weights": weights}}
    version = str(headers[0]["format_version"])
    save_tensors(target, tensors, {"format": FORMAT, "format_version": version, "header": json.dumps(header)})
    return target


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether attached tensors are the same but for the rounding of another device or dtype."""
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2)


def _differing(first: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two headers differ in: name, value of the first, value of the other."""
    pairs = [(key, first.get(key), other.get(key)) for key in ("base_id", "condition_dim", "condition_names")]
    mine, theirs = (comparable_settings(MoRConfig.from_dict(header["config"])) for header in (first, other))
    pairs += [(key, mine[key], theirs[key]) for key in mine]
    pairs.append(("whole", first.get("whole", {}), other.get("whole", {})))
    one, two = (header.get("extra") or {} for header in (first, other))
    if one.get("one_step") and two.get("one_step"):  # both say how to run them
        pairs += [(key, one.get(key), two.get(key)) for key in ("one_step", "estimator", "decoder")]
    layers = [{layer["name"]: layer["shape"] for layer in header["layers"]} for header in (first, other)]
    if layers[0] != layers[1]:
        odd = sorted(name for name in {*layers[0], *layers[1]} if layers[0].get(name) != layers[1].get(name))
        name = odd[0] if odd else "the order of the layers"
        pairs.append((f"the shape of {name}", layers[0].get(name), layers[1].get(name)))
    pairs += [
        (f"what the base's {mine['name']} looks like", mine["print"], theirs["print"])
        for mine, theirs in zip(first["layers"], other["layers"], strict=False)
        if not same_print(mine["print"], theirs["print"])
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]
