"""What adapters bring along beside their ranks: the decoder and the prompts that they were trained with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from morsr.errors import WeightsError
from morsr.models.bases import Base, load_decoder

_SAME = 1e-2  # the embeddings of one text on two machines differ by less, those of two texts by far more


class BesideBase:
    """Decoder and prompts of a run, given by its config or taken from the adapters that it runs.

    Args:
        base: that was loaded with them.
        decoder, prompts: what the config gave, as `load_base` takes them; None where it gave none.
    """

    def __init__(self, base: Base, *, decoder: Any, prompts: Mapping[str, str] | None) -> None:
        self.base, self.decoder, self.prompts = base, decoder, prompts
        self._own_prompts = bool(prompts)

    def facts(self) -> dict[str, Any]:
        """What files of adapters have to say of them."""
        known = {"decoder": self.decoder, "prompts": self.prompts}
        return {name: value for name, value in known.items() if value is not None}

    def decoder_to_take(self, decoder: Any) -> Callable[[], None]:
        """Read the decoder that weights were trained with, unless the run has one; puts it in when called."""
        if decoder is None or self.decoder is not None:
            return lambda: None
        network = load_decoder(decoder).to(self.base.device)

        def take() -> None:
            self.base.use_decoder(network)
            self.decoder = os.fspath(decoder) if isinstance(decoder, Path) else decoder

        return take

    def prompts_to_take(self, stored: Mapping[str, Tensor], extra: Any, source: str) -> Callable[[], None]:
        """Check the prompts that weights were trained with, unless the config gave some; puts them in when called.

        Args:
            stored: their embeddings; files of old versions and imported ones have none.
            extra: of the header, which may hold their texts.
            source: for messages.

        Raises:
            WeightsError: embeddings of another width, which another base's text encoder made.
        """
        if not {"clean", "degraded"} <= stored.keys():
            return lambda: None
        texts = _texts(extra)
        ours = self.base.prompts
        clean, degraded = (_is_same(stored[name], ours[name], source) for name in ("clean", "degraded"))
        if self._own_prompts:
            if not (clean and degraded):
                theirs = f"the prompts {texts}" if texts else "prompts that are the base's own or unnamed"
                rank_zero_warn(
                    f"{source}: trained with {theirs}; this run uses {self.prompts}, which its config gives. Leave "
                    "model.prompts out to run with those of the training"
                )
            return lambda: None

        def take() -> None:
            self.base.set_prompts(stored)
            self.base.prompt = (texts or {}).get("clean") or (self.base.prompt if clean else None)
            self.prompts = texts
            if not (clean and degraded):
                rank_zero_info(f"prompts: those of {source}")

        return take


def _texts(extra: Any) -> dict[str, str] | None:
    """Training writes all prompts that its config gave, a saved folder the text of "clean"."""
    if not isinstance(extra, Mapping):
        return None
    text = extra.get("prompt")
    return extra.get("prompts") or (None if text is None else {"clean": text})


def _is_same(stored: Tensor, ours: Tensor, source: str) -> bool:
    if stored.ndim != 3 or stored.shape[-1] != ours.shape[-1]:
        raise WeightsError(
            f"{source}: made for another base: its prompt embeddings have shape {tuple(stored.shape)}, those of this "
            f"base {tuple(ours.shape)}; load it on that one"
        )
    return stored.shape == ours.shape and torch.allclose(stored.float(), ours.float(), rtol=0, atol=_SAME)
