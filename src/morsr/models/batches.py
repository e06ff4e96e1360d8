"""What the observers of validation and test share: the first images of a batch with all that belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_images(batch: Any, count: int, *needed: str) -> dict[str, Any] | None:
    """The first images of a batch.

    Args:
        batch: as a data module gives it, a mapping whose values all have one entry per image (tensors, lists,
            degradation parameters).
        count: how many are wanted; fewer where the batch is smaller.
        needed: entries without which there is nothing to see, such as "lr".

    Returns:
        The same entries cut to `count` images, or None for no image or a batch that lacks one of `needed`.
    """
    if count < 1 or not isinstance(batch, Mapping) or any(name not in batch for name in needed):
        return None
    return {name: value[:count] for name, value in batch.items() if hasattr(value, "__getitem__")}
