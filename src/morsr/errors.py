"""Exceptions that say what was expected, what came and what to do, and the input checks that raise them."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class MorsrError(Exception):
    """Base of every error that morsr raises on purpose; the command line prints its message as one clear line."""


class InputError(MorsrError, ValueError):
    """An image, tensor, file or folder that was handed in cannot be used."""


class ConfigError(MorsrError, ValueError):
    """A setting that is unknown, out of range or cannot take effect."""


class WeightsError(MorsrError, RuntimeError):
    """Weights that are missing, cut short, or made for another model."""


class TrainingError(MorsrError, RuntimeError):
    """A run that cannot go on; its last checkpoint can be used."""


class MissingDependencyError(MorsrError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


def check_images(images: Tensor, *, name: str = "images") -> Tensor:
    """Check that a tensor is a batch of images and return it unchanged.

    Args:
        images: floating-point tensor (B, 3, H, W) with finite values in [0, 1].
        name: what the message calls the tensor.

    Raises:
        InputError: wrong rank, kind of number or channels, an empty dimension, NaN or infinity, values outside [0, 1].
    """
    if images.ndim != 4:
        raise InputError(f"{name}: expected a tensor (B, C, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise InputError(f"{name}: expected floating-point values in [0, 1], got {images.dtype}; divide by 255 first")
    if images.shape[1] != 3:
        raise InputError(f"{name}: expected 3 channels, got {images.shape[1]}")
    if 0 in images.shape:
        raise InputError(f"{name}: expected at least one pixel and one image, got shape {tuple(images.shape)}")
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails too
        raise InputError(f"{name}: expected finite values in [0, 1], got {low:.4g} to {high:.4g}")
    return images


def class_at(path: str, setting: str, kind: type | None = None) -> Any:
    """What an import path such as mine.Mine names, in the current folder too.

    Args:
        path: module and name.
        setting: what the message calls the place where the path was given.
        kind: a class that it must be a subclass of.

    Raises:
        ConfigError: it cannot be imported, or is neither a class nor a function, or no such subclass.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}: cannot import {path} ({error}); check its name and its folder") from error
    if not (callable(found) if kind is None else isinstance(found, type) and issubclass(found, kind)):
        expected = "class" if kind is None else f"subclass of {kind.__module__}.{kind.__name__}"
        raise ConfigError(f"{setting}: expected a {expected}, got {path}, which is {found!r}")
    return found


def check_fields(settings: Any, *, least: Mapping[str, float] | None = None) -> None:
    """Check the fields of a dataclass against their annotations; numbers must be finite and at least 0.

    Args:
        settings: a dataclass whose fields are numbers, strings, Literals, or tuples of strings; others are not checked.
        least: other lower bounds by field.

    Raises:
        ConfigError: with the field, what was expected and what came.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        name, hint, value = field.name, hints[field.name], getattr(settings, field.name)
        low = (least or {}).get(name, 0)
        if typing.get_origin(hint) is typing.Literal:
            expected, fits = f"one of {', '.join(map(str, typing.get_args(hint)))}", value in typing.get_args(hint)
        elif hint in (int, float):
            fits = isinstance(value, (int, hint)) and not isinstance(value, bool) and low <= value < float("inf")
            expected = f"a {'whole ' if hint is int else ''}number of at least {low:g}"
        elif hint == tuple[str, ...]:
            expected = "a list of non-empty strings"
            fits = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
        else:
            continue
        if not fits:
            raise ConfigError(f"{name}: expected {expected}, got {value!r}")
