"""The one door to basicsr, which imports a torchvision module that newer torchvision no longer has."""

from __future__ import annotations

import importlib
import sys
import types

from morsr.errors import MissingDependencyError

_REMOVED = "torchvision.transforms.functional_tensor"


def import_basicsr(name: str) -> types.ModuleType:
    """Import `basicsr.<name>`, with the one torchvision function it misses put back.

    Args:
        name: dotted path below basicsr, such as "data.degradations".

    Raises:
        MissingDependencyError: basicsr, or something it needs, is not installed.
    """
    try:
        if _REMOVED not in sys.modules:
            try:
                importlib.import_module(_REMOVED)
            except ModuleNotFoundError:
                alias = types.ModuleType(_REMOVED)
                alias.rgb_to_grayscale = importlib.import_module(  # type: ignore[attr-defined]
                    "torchvision.transforms.functional"
                ).rgb_to_grayscale
                sys.modules[_REMOVED] = alias
        return importlib.import_module(f"basicsr.{name}")
    except ImportError as error:
        raise MissingDependencyError(
            f"basicsr.{name} cannot be imported ({error}); install the extra: pip install 'morsr[reference]'"
        ) from error
