"""The networks over images of any size: routing, merge, tiles, and smaller tiles when memory runs out."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from morsr.adapters import Routing, adapter_names, merged
from morsr.adapters.inject import switch_of
from morsr.errors import InputError
from morsr.functional.resample import bicubic_window, unit_range
from morsr.imaging import Canvas
from morsr.restoring.devices import free_memory, is_out_of_memory
from morsr.restoring.settings import Settings
from morsr.restoring.tiles import Tiling, run_pass, tile_side, tiling

if TYPE_CHECKING:
    from morsr.models.generator import OneStepGenerator

Progress = Callable[[int, int], None]

SMALL_NETWORK = 100_000_000  # parameters of a UNet below which a merge costs less than the ranks of a single pass
RELEASE_EVERY = 8  # tiles after which the memory of a canvas in a file is given back
MERGE_PASSES = 8  # tiles of an image from which a merge of a larger UNet is repaid

# One lock per generator, which has one routing for all who use it; kept here, so that none is copied or pickled.
_LOCKS: WeakKeyDictionary[nn.Module, contextlib.AbstractContextManager[Any]] = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


class Passes:
    """Runs a generator over images, tile by tile, one thread at a time.

    Args:
        generator: in eval mode, on the device.
        device: where it runs.
        dtype: precision of the networks.
    """

    def __init__(self, generator: OneStepGenerator, device: torch.device, dtype: torch.dtype) -> None:
        self.generator, self.device, self.dtype = generator, device, dtype

    def restore(
        self,
        lr: Tensor,
        settings: Settings,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> tuple[Canvas, Routing | None]:
        """What the networks make of an image (1, 3, h, w), with smaller tiles when memory runs out, and the routing.

        Args:
            lr: floats in [0, 1], or uint8 or uint16 as fractions of their largest value.
            folder: of the canvas's file; None keeps the canvas in memory.
        """
        size, shrink = settings.output_size(*lr.shape[-2:]), settings.shrink(self.generator.one_step.scale)
        fine = (size[0] * shrink, size[1] * shrink)
        side = tile_side(self.generator, fine, settings.tile, free_memory(self.device))
        while True:
            plan = tiling(fine, side, math.lcm(self.generator.multiple, shrink))
            try:
                canvas = Canvas((1, 3, *size), folder=folder)
                with self.alone():
                    return canvas, self._tiles(lr.to(self.device), canvas, plan, shrink, settings, progress)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # The failed pass's tensors live as long as its exception does, so memory is handed back only here.
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()
            side = plan.side // 2 // self.generator.multiple * self.generator.multiple
            if side < 2 * self.generator.multiple:
                raise InputError(f"memory ran out even with tiles of {plan.side} pixels; free some")
            warnings.warn(f"memory ran out at {plan.side} pixels a side; trying tiles of {side}", stacklevel=3)

    def _tiles(
        self, lr: Tensor, canvas: Canvas, plan: Tiling, shrink: int, settings: Settings, progress: Progress | None
    ) -> Routing | None:
        height, width = canvas.tensor.shape[-2:]
        size, windows = (height * shrink, width * shrink), plan.windows
        with self._routed(lr, settings) as routing, self._merged(len(windows)):
            for done, window in enumerate(windows):
                place = {"top": window.top, "left": window.left, "height": window.height, "width": window.width}
                enlarged = bicubic_window(lr, size, **place).clamp(0, 1)
                window.add(canvas.tensor, run_pass(self.generator, enlarged, self.dtype), shrink)
                if done % RELEASE_EVERY == 0:
                    canvas.release()
                if progress is not None:
                    progress(done + 1, len(windows))
        return routing

    @contextlib.contextmanager
    def _routed(self, lr: Tensor, settings: Settings) -> Iterator[Routing | None]:
        """The routing of an image for as long as the block lasts; then the model is as it was."""
        adapters = self.generator.adapters
        if adapters is None or not adapters.is_routed:
            yield None
            return
        before, adapters.strength = adapters.strength, settings.strength
        try:
            if settings.routing is not None:
                yield adapters.route(settings.routing.to(self.device))
            else:
                self.generator.route(unit_range(lr))
                yield adapters.routing
        finally:
            adapters.route(None)
            adapters.strength = before

    @contextlib.contextmanager
    def _merged(self, passes: int) -> Iterator[None]:
        """Ranks in the weights where one image's passes repay it; decided once per image and network."""
        base, switch = self.generator.base, switch_of(self.generator)
        with contextlib.ExitStack() as stack:
            if switch is not None and switch.active is not None:
                small = sum(weight.numel() for weight in base.denoiser.parameters()) < SMALL_NETWORK
                # The VAE encoder has few weights and many pixels; a large UNet repays its merge over several tiles.
                for network in (base.vae, base.denoiser):
                    repaid = network is base.vae or small or passes >= MERGE_PASSES
                    if repaid and adapter_names(network) and self._has_room(network):
                        stack.enter_context(merged(network))
            yield

    def _has_room(self, network: nn.Module) -> bool:
        """Whether the memory holds a second copy of a network's weights with room for a pass; else ranks are masked."""
        return 2 * sum(weight.nbytes for weight in network.parameters()) < free_memory(self.device)

    def alone(self) -> contextlib.AbstractContextManager[Any]:
        """Keep other threads off the generator inside a ``with`` block; the same thread may come in again."""
        with _NEW_LOCK:
            return _LOCKS.setdefault(self.generator, threading.RLock())
