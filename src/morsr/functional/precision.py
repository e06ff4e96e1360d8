"""Keeping some tensors in float32 while the model around them is stored or run in half precision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from morsr.errors import ConfigError

_PRODUCTS = threading.RLock()
_HALF = (torch.float16, torch.bfloat16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def float_type(dtype: str | torch.dtype) -> torch.dtype:
    """The type that a name means; ConfigError for another than float32, bfloat16 and float16."""
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ConfigError(f"dtype: expected {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def keep_float32(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap what `Module._apply` hands around, so that it moves float32 tensors but does not halve them.

    `.to(torch.bfloat16)` and `.half()` of a whole model then leave these tensors as precise as they were;
    float64 and devices go through.

    >>> keep_float32(lambda tensor: tensor.bfloat16())(torch.ones(2)).dtype
    torch.float32
    """

    def keep(tensor: Tensor) -> Tensor:
        moved = function(tensor)
        return tensor.to(moved.device) if moved.dtype in _HALF and tensor.dtype == torch.float32 else moved

    return keep


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off inside a ``with`` block; on the meta device, which has none, nothing happens."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices as float32 inside a ``with`` block, whatever `torch.set_float32_matmul_precision` says.

    The setting is the process's: other threads have it too for so long, and wait before they change it themselves.
    """
    mkldnn: Any = torch.backends.mkldnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, mkldnn.matmul)
    with _PRODUCTS:  # else one of two threads would restore the other's setting
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
