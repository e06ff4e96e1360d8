"""Run an autoencoder tile by tile with the result of the whole: cores with a margin, group statistics over all tiles.

The autoencoder takes several times the memory of the UNet. Its convolutions reach only a few latent pixels, so a tile
with that margin computes its core exactly; what sees the whole image are the group norms, whose statistics are shared
over the tiles here, and the attention in the middle, which runs untiled at latent resolution.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morsr.functional.tiling import Window


class Core(NamedTuple):
    """One tile in latent pixels: what it computes, and what it sees."""

    core: Window
    seen: Window


@contextlib.contextmanager
def vae_tiles(vae: nn.Module, factor: int, side: int | None) -> Iterator[None]:
    """Make an autoencoder's encoder and decoder work in tiles for as long as the block lasts.

    Args:
        vae: a diffusers AutoencoderKL or AutoencoderTiny.
        factor: pixels per latent along each axis.
        side: of a tile's core in latent pixels; None leaves the networks as they are.
    """
    if side is None:
        yield
        return
    networks = [getattr(vae, "encoder", None), getattr(vae, "decoder", None)]
    ratios = [(factor, 1), (1, factor)]
    patched = []
    try:
        for network, (reads, writes) in zip(networks, ratios, strict=True):
            if isinstance(network, nn.Module):
                network.forward = _tiled(network, network.forward, reads, writes, side)  # type: ignore[method-assign]
                patched.append(network)
        yield
    finally:
        for network in patched:
            del network.forward  # the class's own comes back


def _tiled(
    network: Any, whole: Callable[..., Tensor], reads: int, writes: int, side: int
) -> Callable[[Tensor], Tensor]:
    before, tiled, after = _parts(network, whole)
    margin: list[int] = []

    def forward(inputs: Tensor, *arguments: Any) -> Tensor:
        inputs = before(inputs)
        height, width = (length // reads for length in inputs.shape[-2:])
        if max(height, width) <= side:
            return after(tiled(inputs))
        if not margin:
            margin.append(reach(network, tiled, inputs[..., : 8 * reads, : 8 * reads], reads))
        cores = tile_cores(height, width, side, margin[0])
        return after(run_tiles(network, tiled, inputs, cores, reads, writes))

    return forward


def _parts(network: Any, whole: Callable[..., Tensor]) -> tuple[Callable[[Tensor], Tensor], ...]:
    """What runs whole before, what runs in tiles, and what runs whole after."""

    def chain(*modules: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(inputs: Tensor) -> Tensor:
            for module in modules:
                inputs = module(inputs)
            return inputs

        return run

    if hasattr(network, "mid_block"):
        ends = (network.conv_norm_out, network.conv_act, network.conv_out)
        if hasattr(network, "up_blocks"):
            return chain(network.conv_in, network.mid_block), chain(*network.up_blocks, *ends), chain()
        return chain(), chain(network.conv_in, *network.down_blocks), chain(network.mid_block, *ends)
    return chain(), whole, chain()


def tile_cores(height: int, width: int, side: int, margin: int) -> list[Core]:
    """Cut (height, width) into cores of at most `side`, each seen with a margin inside the image."""
    cores = []
    for top, left in itertools.product(range(0, height, side), range(0, width, side)):
        bottom, right = min(top + side, height), min(left + side, width)
        first, start = max(0, top - margin), max(0, left - margin)
        seen = Window(first, start, min(height, bottom + margin) - first, min(width, right + margin) - start)
        cores.append(Core(Window(top, left, bottom - top, right - left), seen))
    return cores


@torch.no_grad()
def reach(network: nn.Module, tiled: Callable[[Tensor], Tensor], example: Tensor, reads: int) -> int:
    """How many latent pixels away an input can change an output through convolutions, found in a run of an example."""
    latents = example.shape[-1] / reads
    far: list[float] = []

    def note(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        finest = min(arguments[0].shape[-1], output.shape[-1]) / latents
        far.append((max(module.kernel_size) // 2) / finest)

    hooks = [module.register_forward_hook(note) for module in network.modules() if isinstance(module, nn.Conv2d)]
    try:
        tiled(example)
    finally:
        for hook in hooks:
            hook.remove()
    return math.ceil(sum(far)) + 1


def run_tiles(
    network: nn.Module,
    tiled: Callable[[Tensor], Tensor],
    inputs: Tensor,
    cores: list[Core],
    reads: int,
    writes: int,
) -> Tensor:
    """Run a part of a network on tiles, with one set of group statistics for all of them.

    Args:
        network: owns the group norms.
        tiled: the part, a function of (B, C, h, w).
        inputs: (B, C, reads · H, reads · W).
        cores: tiles in latent pixels that cover (H, W).
        reads, writes: pixels of the input and of the output per latent pixel.

    Returns:
        (B, C', writes · H, writes · W).
    """
    height, width = (length // reads * writes for length in inputs.shape[-2:])
    result: Tensor | None = None

    def finish(core: Core, output: Tensor) -> None:
        nonlocal result
        if result is None:
            result = output.new_empty((*output.shape[:2], height, width))
        place, (top, left, rows, columns) = core.core, (writes * value for value in core.core)
        inside = output[
            ...,
            writes * (place.top - core.seen.top) : writes * (place.top - core.seen.top) + rows,
            writes * (place.left - core.seen.left) : writes * (place.left - core.seen.left) + columns,
        ]
        result[..., top : top + rows, left : left + columns] = inside

    def cut(core: Core) -> Tensor:
        return Window(*(reads * value for value in core.seen)).cut(inputs)

    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    if not norms:
        for core in cores:
            finish(core, tiled(cut(core)))
    else:
        _Lockstep(norms, cores).run(tiled, cut, finish)
    assert result is not None
    return result


class _Stopped(Exception):
    """Ends the threads of tiles whose neighbour has failed."""


class _Tile(threading.Thread):
    """One tile's way through the network: runs when it is told to, rests at every group norm."""

    def __init__(self, core: Core, work: Callable[[_Tile], None], rested: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.core, self.work, self.rested = core, work, rested
        self.go = threading.Semaphore(0)
        self.part: tuple[int, Tensor, Tensor] | None = None
        self.error: BaseException | None = None
        self.stopped = False

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopped:
                self.work(self)
        except BaseException as error:
            self.error = error
        finally:
            self.part = None
            self.rested.release()

    def rest(self, part: tuple[int, Tensor, Tensor]) -> None:
        self.part = part
        self.rested.release()
        self.go.acquire()
        if self.stopped:
            raise _Stopped


class _Lockstep:
    """Takes all tiles from one group norm to the next, one at a time, and normalises by the statistics of all.

    Only the tile that runs is on the device; the others wait in main memory.
    """

    def __init__(self, norms: list[nn.GroupNorm], cores: list[Core]) -> None:
        self.norms, self.cores = norms, cores
        self.mean, self.deviation = torch.zeros(0), torch.zeros(0)
        self.rested = threading.Semaphore(0)

    def run(
        self,
        tiled: Callable[[Tensor], Tensor],
        cut: Callable[[Core], Tensor],
        finish: Callable[[Core, Tensor], None],
    ) -> None:
        kind = cut(self.cores[0]).device.type
        gradient, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind)

        def work(tile: _Tile) -> None:
            # Both switches belong to a thread.
            with torch.set_grad_enabled(gradient), torch.autocast(kind, dtype=dtype, enabled=autocast):
                finish(tile.core, tiled(cut(tile.core)))

        tiles = [_Tile(core, work, self.rested) for core in self.cores]
        for norm in self.norms:
            norm.forward = _shared(self, norm)  # type: ignore[method-assign,assignment]
        for tile in tiles:
            tile.start()
        try:
            running = tiles
            while running:
                for tile in running:
                    tile.go.release()
                    self.rested.acquire()
                    if tile.error is not None:
                        raise tile.error
                running = [tile for tile in running if tile.part is not None]
                if running:
                    self._merge([tile.part for tile in running if tile.part is not None])
        finally:
            for norm in self.norms:
                del norm.forward
            for tile in tiles:
                tile.stopped = True
                tile.go.release()
            for tile in tiles:
                tile.join()

    def _merge(self, parts: list[tuple[int, Tensor, Tensor]]) -> None:
        """Mean and deviation over all tiles from each one's count, mean and sum of squared differences."""
        total = sum(count for count, _, _ in parts)
        mean = sum((count / total * part for count, part, _ in parts), torch.zeros(()))
        square = sum((part + count * (own - mean).square() for count, own, part in parts), torch.zeros(()))
        self.mean, self.deviation = mean, square / total

    def normalise(self, norm: nn.GroupNorm, features: Tensor) -> Tensor:
        tile = threading.current_thread()
        assert isinstance(tile, _Tile)
        grouped = features.float().unflatten(1, (norm.num_groups, -1))
        scale = features.shape[-1] / tile.core.seen.width
        top, left = (
            round(scale * (getattr(tile.core.core, side) - getattr(tile.core.seen, side))) for side in ("top", "left")
        )
        rows, columns = round(scale * tile.core.core.height), round(scale * tile.core.core.width)
        inside = grouped[..., top : top + rows, left : left + columns]
        mean = inside.mean(dim=(2, 3, 4), keepdim=True)
        square = (inside - mean).square().sum(dim=(2, 3, 4), keepdim=True)
        count = inside[0, 0].numel()
        del grouped, inside
        device, waiting = features.device, features.cpu()
        del features
        tile.rest((count, mean.cpu(), square.cpu()))
        grouped = waiting.to(device).float().unflatten(1, (norm.num_groups, -1))
        normal = (grouped - self.mean.to(device)) * (self.deviation.to(device) + norm.eps).rsqrt()
        result = normal.flatten(1, 2) * norm.weight[:, None, None] + norm.bias[:, None, None]
        return result.to(waiting.dtype)


def _shared(lockstep: _Lockstep, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    return lambda features: lockstep.normalise(norm, features)
