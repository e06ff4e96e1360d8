"""Any image in, the restored image out, in the same kind, mode and depth: the one callable that users of a model need.

Flow: picture → scores of the whole image → routing, once → enlarged windows → generator → blended bands of rows →
colour → the picture's own form. Nothing but the rows in work exists at full size, so that a file can be streamed.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from morsr.adapters import Routing, auto_merged
from morsr.errors import InputError
from morsr.functional.resample import bicubic_window
from morsr.functional.tiling import RowBuffer
from morsr.models.bands import Bands, color_bands, upsampled_rows
from morsr.models.jobs import check_target
from morsr.models.memory import blocks_handed_back, trim_host_memory
from morsr.models.passes import TilePlan, check_output_memory, run_pass, tile_plan
from morsr.models.picture import Picture, read_picture
from morsr.models.picture_files import atomic_file, form_for, read_file, write_picture
from morsr.models.scratch import FilePixels
from morsr.models.settings import RoutingMode, Settings, resolve_device, resolve_dtype
from morsr.models.streaming import can_stream, stream_rows

if TYPE_CHECKING:
    from morsr.models.generator import OneStepGenerator

Progress = Callable[[int, int], None]

# One lock per generator, which has one routing for all who use it; kept here, so that none is copied or pickled.
_LOCKS: WeakKeyDictionary[nn.Module, contextlib.AbstractContextManager[Any]] = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


class Restorer:
    """Restore images with a one-step generator.

    Calls from several threads wait for each other, since a generator has one routing; `twin` is for work in parallel.

    Args:
        generator: put into eval mode and onto the device.
        device: where it runs; "auto" takes the machine's accelerator if there is one.
        dtype: precision of the networks: "auto" (bfloat16 or float16 on an accelerator, float32 on a processor), or a
            torch dtype or its name. Weights stay as they are; routing, scores and the clean latents are always float32.
        compile: run the networks through torch.compile; the first image of every new tile size takes minutes then.

    Raises:
        ConfigError: an unknown device or dtype.
    """

    def __init__(
        self,
        generator: OneStepGenerator,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        compile: bool = False,
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.generator = generator.eval().to(self.device)
        self._held: Routing | None = None
        self.compiled = compile
        if compile:
            for network in self.generator.networks:
                network.compile()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = "tiny",
        *,
        base: str | os.PathLike[str] | None = None,
        decoder: str | os.PathLike[str] | None = None,
        prompt: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        compile: bool = False,
        **hub: Any,
    ) -> Restorer:
        """Load a trained model.

        Args:
            name_or_path: a shipped preset ("tiny"), an adapters .safetensors, a saved folder, a training .ckpt, or the
                hub id of a saved folder.
            base: folder or hub id of the base model, where the adapters do not bring it.
            decoder: an AutoencoderTiny that decodes in place of the base's own autoencoder, at a fraction of its work:
                "taesd" for Stable Diffusion 1 and 2, a folder, or a hub id. Default: what the model was saved with.
            prompt: text in place of the prompt that comes with the model; needs the base's text encoder.
            device, dtype, compile: see the class.
            hub: revision, cache_dir, token and local_files_only, as `huggingface_hub.snapshot_download` takes them.

        Raises:
            WeightsError: missing or damaged weights, adapters of another base, or a prompt without a text encoder.
            ConfigError: a decoder for other latents, or of another kind.
        """
        from morsr.models.loading import load_generator

        resolve_dtype(dtype, resolve_device(device))  # a wrong setting is told before seconds of loading
        generator = load_generator(name_or_path, base=base, decoder=decoder, prompt=prompt, **hub)
        return cls(generator, device=device, dtype=dtype, compile=compile)

    def twin(self) -> Restorer:
        """Another restorer over the same weights with a routing of its own, so that two threads can each run one.

        Only for images in a single pass: a merge of ranks changes the weights that both share.
        """
        other = copy.copy(self)
        with self._alone():
            shared = itertools.chain(self.generator.parameters(), self.generator.buffers())
            other.generator = copy.deepcopy(self.generator, {id(tensor): tensor for tensor in shared})
        other.reset_sequence()
        return other

    def save_pretrained(self, folder: str | os.PathLike[str], *, include_base: bool | None = None) -> Path:
        """Write the model as a folder for `from_pretrained`, here or uploaded to the hub.

        Args:
            folder: made if it is not there.
            include_base: put the base's weights in; default only where no preset or hub id names it.

        Raises:
            InputError, ConfigError: a folder that is a file, or parts that cannot be described.
            WeightsError: weights that hold NaN or infinity; what was in the folder stays.
        """
        from morsr.models.saving import save_generator

        with self._alone():  # else another thread's merge could be written
            return save_generator(folder, self.generator, include_base=include_base)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        *,
        scale: float = 4.0,
        budget: int | None = None,
        generative: float = 1.0,
        tile: int | Literal["auto"] | None = "auto",
        color: str = "wavelet",
        color_strength: float = 1.0,
        routing: RoutingMode = "image",
        return_routing: bool = False,
    ) -> Any:
        """Restore one image, or a batch of equal size as a tensor.

        Args:
            image: path, PIL image, numpy array (H, W) or (H, W, C) of uint8, uint16 or floats in [0, 1], or tensor
                (B, 3, H, W) of floats in [0, 1]. Alpha is enlarged beside the colours.
            scale: enlargement, 1 to 8; the output has exactly round(scale · side) pixels a side.
            budget: at most so many routed ranks run per layer, those with the largest gates; None for all.
            generative: factor on the routed gates: 0 keeps the shared ranks only, 1 is as trained.
            tile: side of the tiles in output pixels, rounded up to what the networks take; "auto" goes by size and free
                memory; None for a single pass. Should memory run out, smaller tiles are used.
            color: "wavelet", "adain" or "none": how the input's colours are put back.
            color_strength: 0 to 1.
            routing: "image", one routing from the whole image for all tiles; "tile", each tile scored by itself;
                "sequence", the routing of the first image for all that follow, see `reset_sequence`.
            return_routing: return (image, Routing) instead, of one routing per image of the batch however it was
                divided; with routing="tile" a list with such a Routing per tile, in rows from the top.

        Returns:
            The image in the kind, mode and depth in which it came; of a path a PIL image, or for 16-bit colours, which
            Pillow does not have, a uint16 array.

        Raises:
            InputError: not an image, damaged, out of range, or too large for the memory.
            ConfigError: a setting out of range, or one that cannot take effect.
            WeightsError: the networks give NaN even in float32.
        """
        settings = self.settings(
            scale=scale, budget=budget, generative=generative, tile=tile, color=color, color_strength=color_strength,
            routing=routing,
        )  # fmt: skip
        picture = read_picture(image)
        with self._alone(), settings.applied(self.generator.context):
            result, routings = self._restore(picture, settings)
        restored = result.to_kind()
        return (restored, routings) if return_routing else restored

    @torch.no_grad()
    def restore_file(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        scale: float = 4.0,
        budget: int | None = None,
        generative: float = 1.0,
        tile: int | Literal["auto"] | None = "auto",
        color: str = "wavelet",
        color_strength: float = 1.0,
        routing: RoutingMode = "image",
        format: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Restore an image file into another file, which appears only when it is complete.

        Large PNG and TIFF outputs are written row by row, so that memory grows with the width only.

        Args:
            source: the image file.
            target: the file to write; its suffix decides the format, unless `format` does. Profile, EXIF and
                resolution are carried over.
            progress: called with (tiles done, tiles in all).
            scale, budget, generative, tile, color, color_strength, routing: as for the call.

        Raises:
            InputError: as for the call, and a target that cannot be written, cannot hold the image, or is the source.
        """
        settings = self.settings(
            scale=scale, budget=budget, generative=generative, tile=tile, color=color, color_strength=color_strength,
            routing=routing,
        )  # fmt: skip
        check_target(source, target)
        picture = read_file(source, compact=True)
        size = settings.size(picture)
        form = form_for(picture, target, size, format)
        with self._alone(), settings.applied(self.generator.context):
            if can_stream(picture, form, size):
                with atomic_file(target) as file, blocks_handed_back():
                    pixels = FilePixels(Path(target).parent)
                    picture = picture.with_form(replace(form, orientation=1)).moved(
                        pixels.moved
                    )  # upright, on the disk
                    stream_rows(file, self, picture, settings, pixels, progress)
                return
            result, _ = self._restore(picture.expanded(), settings, progress)
        write_picture(result, target, format=format)

    @torch.no_grad()
    def restore_pictures(self, pictures: Sequence[Picture], settings: Settings) -> list[Picture]:
        """Restore pictures of one size in one batch, each with its own routing; see `Settings` for what can be asked.

        Raises:
            InputError: sizes that differ, or what a call raises.
        """
        settings.check_model(self.generator)
        if len({picture.size for picture in pictures}) != 1:
            raise InputError(f"a batch takes pictures of one size, got {sorted({p.size for p in pictures})}")
        whole = [picture.expanded() for picture in pictures]
        with self._alone(), settings.applied(self.generator.context):
            rgb, _ = self._restore_batch(torch.cat([picture.rgb for picture in whole]), settings)
        return [self._finished(picture, rgb[index : index + 1], settings) for index, picture in enumerate(whole)]

    def settings(self, **settings: Any) -> Settings:
        """Check settings of a call without an image, with the defaults for those that are left out.

        Raises:
            ConfigError: a setting out of range, or one that cannot take effect.
        """
        checked = Settings(**settings)
        checked.check_model(self.generator)
        return checked

    @torch.no_grad()
    def begin_sequence(self, image: Any) -> None:
        """Hold the routing of an image for all that follow with routing="sequence"."""
        context = self.generator.context
        if context is None or not context.config.is_routed:
            return
        lr = read_picture(image).rgb[:1].to(self.device)
        with self._alone():
            self.generator.condition(lr)
            self._held, context.condition = context.routing, None

    def reset_sequence(self) -> None:
        """Forget the routing that routing="sequence" holds, so that the next image sets it anew."""
        with self._alone():
            self._held = None

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        """Keep other threads off the generator inside a ``with`` block; the same thread may come in again."""
        with _NEW_LOCK:
            return _LOCKS.setdefault(self.generator, threading.RLock())

    def _restore(
        self, picture: Picture, settings: Settings, progress: Progress | None = None
    ) -> tuple[Picture, Routing | list[Routing] | None]:
        rgb, routings = self._restore_batch(picture.rgb, settings, progress)
        result = self._finished(picture, rgb, settings)
        if settings.routing == "tile":  # restored image by image
            tiles = len(routings) // len(picture.rgb)
            return result, [join_routings(routings[tile::tiles]) for tile in range(tiles)]
        return result, join_routings(routings) if routings else None

    def _restore_batch(
        self, rgb: Tensor, settings: Settings, progress: Progress | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Restore images (B, 3, h, w), as many at once as the memory is expected to hold."""
        batch, _, height, width = rgb.shape
        size = round(height * settings.scale), round(width * settings.scale)
        check_output_memory(size, batch)
        plan = tile_plan(self.generator, size, settings.tile, self.device)
        share = batch if plan.single and settings.routing != "tile" else 1
        share = max(1, min(share, plan.pixels_at_once // (plan.height * plan.width)))
        parts, routings = [], []
        for lr in rgb.split(share):
            bands, found = self.bands(lr.to(self.device), size, plan, settings, progress)
            parts.append(torch.cat([rows.cpu() for rows in bands()], dim=-2))
            routings += found
        return torch.cat(parts), routings

    def _finished(self, picture: Picture, rgb: Tensor, settings: Settings) -> Picture:
        size = settings.size(picture)
        alpha, black = (
            None if plane is None else bicubic_window(plane, size, height=size[0], width=size[1]).clamp(0, 1)
            for plane in (picture.alpha, picture.black)
        )
        return picture.replaced(rgb, alpha, black)

    def bands(
        self,
        lr: Tensor,
        size: tuple[int, int],
        plan: TilePlan,
        settings: Settings,
        progress: Progress | None,
        forget: Callable[[], None] | None = None,
        buffer: Callable[[], RowBuffer] | None = None,
    ) -> tuple[Bands, list[Routing]]:
        """Finished rows of one image or of one batch, made anew each time they are asked for, and its routing.

        A streamed image has `forget`, called before every pass to let go of what was read of it.
        """
        context = self.generator.context
        routings: list[Routing] = []
        if settings.routing != "tile":
            self._route(lr, settings)
            if context is not None and context.routing is not None:
                routings.append(context.routing)
        mergeable = context is not None and lr.shape[0] == 1 and settings.routing != "tile"
        passes = len(plan.windows)

        def tiles() -> Iterator[tuple[Any, Tensor]]:
            # An open merge costs a write per change of routing, so tiles with their own routing gather their ranks.
            with auto_merged(self.generator.backbone, passes) if mergeable else contextlib.nullcontext():
                for done, window in enumerate(plan.windows):
                    if settings.routing == "tile":
                        self._route(plan.source_part(lr, window, size), settings)
                        if context is not None and context.routing is not None:
                            routings.append(context.routing)
                    enlarged = bicubic_window(
                        lr, size, top=window.top, left=window.left, height=window.height, width=window.width
                    ).clamp(0, 1)
                    if forget is not None:
                        forget()
                        trim_host_memory()
                    result = run_pass(self.generator, enlarged, plan, self.dtype)
                    del enlarged
                    yield window, result
                    del result
                    if progress is not None:
                        progress(done + 1, passes)

        reference = upsampled_rows(lr, size)
        rows = plan.blended(tiles, size, buffer)
        return color_bands(
            rows, reference, size, settings.color, settings.color_strength, hold=forget is None
        ), routings

    def _route(self, lr: Tensor, settings: Settings) -> None:
        context = self.generator.context
        if context is None or not context.config.is_routed:
            return
        if settings.routing != "sequence":
            self.generator.condition(lr)
            return
        if self._held is None:
            self.generator.condition(lr[:1])
            self._held = context.routing
        held = self._held
        if held is not None:
            context.routing = join_routings([held] * lr.shape[0])


def join_routings(routings: list[Routing]) -> Routing:
    """Routings (L, B, …) of several batches as one."""
    return Routing(*(torch.cat(parts, dim=1) for parts in zip(*routings, strict=True)))
