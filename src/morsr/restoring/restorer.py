"""Any image in, the restored image out, in the same kind, mode and depth: the one callable that users of a model need.

Flow: picture → scores of the whole image → routing, once → merge → tiles → canvas → colour → the picture's own form.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from morsr.adapters import Routing, adapter_names, merged
from morsr.errors import InputError, WeightsError
from morsr.functional.resample import bicubic_window
from morsr.imaging import Canvas, Picture, read, write
from morsr.imaging.files import check_output, read_planes
from morsr.restoring.devices import free_memory, is_out_of_memory, release_memory, resolve_device, resolve_dtype
from morsr.restoring.settings import Settings
from morsr.restoring.tiles import (
    Tiling,
    affordable_pixels,
    enlarged_rows,
    finished_rows,
    run_pass,
    source_part,
    tile_side,
    tiling,
)

if TYPE_CHECKING:
    from morsr.models.generator import OneStepGenerator

Progress = Callable[[int, int], None]
Found = Routing | list[Routing] | None

SMALL_NETWORK = 100_000_000  # parameters of a UNet below which a merge costs less than the ranks of a single pass
MERGE_PASSES = 8  # tiles of an image from which a merge of a larger UNet is repaid
STREAM_PIXELS = 16_000_000  # files with larger outputs are written row by row instead of being held in memory
OUTPUT_BYTES = 40  # main memory per pixel of an output that is held: canvas, finished rows, and samples made of them

# One lock per generator, which has one routing for all who use it; kept here, so that none is copied or pickled.
_LOCKS: WeakKeyDictionary[nn.Module, contextlib.AbstractContextManager[Any]] = WeakKeyDictionary()
_NEW_LOCK = threading.Lock()


class Restorer:
    """Restore images with a one-step generator. Calls from several threads wait for each other.

    Args:
        generator: put into eval mode and onto the device.
        device: where it runs; "auto" takes the machine's accelerator if there is one.
        dtype: precision of the networks: "auto" (bfloat16 or float16 on an accelerator, float32 on a processor), or a
            torch dtype or its name. Weights stay as they are; routing, scores and the clean latents are always float32.
        compile: run the networks through torch.compile; the first image of every new tile size takes minutes then.

    Raises:
        ConfigError: an unknown device or dtype.

    Example:
        >>> restorer = Restorer.from_pretrained("tiny", device="cpu")
        >>> restorer(torch.rand(1, 3, 8, 8), scale=2.5).shape
        torch.Size([1, 3, 20, 20])
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
        if compile:
            for network in self.generator.networks:
                network.compile()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = "tiny",
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
            name_or_path: a shipped preset ("tiny"), an adapters .safetensors, a saved folder, a training .ckpt, the hub
                id of a saved folder, or a list of these, of which the first that can be read is taken.
            base: folder or hub id of the base model, where the adapters do not bring it.
            decoder: an AutoencoderTiny that decodes instead of the base's own autoencoder, at a fraction of its work:
                "taesd" for Stable Diffusion 1 and 2, a folder, or a hub id. Default: what the model was saved with.
            prompt: text instead of the prompt that comes with the model; needs the base's text encoder.
            device, dtype, compile: see the class.
            hub: revision, cache_dir, token and local_files_only, as `huggingface_hub.snapshot_download` takes them.

        Raises:
            WeightsError: missing or damaged weights, adapters of another base, or a prompt without a text encoder.
            ConfigError: a decoder for other latents, or of another kind.
        """
        from morsr.models.loading import load_generator

        resolve_dtype(dtype, resolve_device(device))  # a wrong setting is refused before seconds of loading
        names = [name_or_path] if isinstance(name_or_path, (str, os.PathLike)) else list(name_or_path)
        failed: list[str] = []
        for name in names:
            try:
                generator = load_generator(name, base=base, decoder=decoder, prompt=prompt, **hub)
            except WeightsError as error:
                if len(names) == 1:
                    raise
                failed.append(str(error))
                continue
            return cls(generator, device=device, dtype=dtype, compile=compile)
        raise WeightsError(f"none of {len(names)} models can be read: {'; '.join(failed)}")

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

    def push_to_hub(
        self, repository: str, *, include_base: bool | None = None, private: bool | None = None, token: Any = None
    ) -> str:
        """Upload the folder of `save_pretrained` to a repository of the hub, made if it is not there; returns its URL.

        Args:
            repository: "name/model".
            include_base: see `save_pretrained`.
            private: of a new repository.
            token: as `huggingface_hub` takes it; default the one of `hf auth login`.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_base=include_base)
            name = api.create_repo(repository, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a morsr model")
        return f"{api.endpoint}/{name}"

    def __repr__(self) -> str:
        generator, adapters = self.generator, "no adapters"
        if generator.adapters is not None:
            config, layers = generator.adapters.config, len(generator.adapters.layer_names)
            adapters = f"{config.num_ranks} ranks in {layers} layers"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Restorer(base {generator.backbone.base_id!r}, {adapters}, {self.device}, {dtype})"

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        scale: float = 4.0,
        *,
        strength: float = 1.0,
        tile: int | Literal["auto"] | None = "auto",
        color: Literal["wavelet", "adain", "none"] = "wavelet",
        color_strength: float = 1.0,
        routing: Literal["image", "tile"] | Routing = "image",
        return_routing: bool = False,
    ) -> Any:
        """Restore an image, a list of images, or a batch of equal size as a tensor.

        Args:
            image: path, PIL image, numpy array (H, W) or (H, W, C) of uint8, uint16 or floats in [0, 1], tensor
                (B, 3, H, W) of floats in [0, 1], or a list of these. Alpha is enlarged beside the colours.
            scale, strength, tile, color, color_strength, routing: see `Settings`.
            return_routing: return (image, Routing) instead, with one routing per image of a batch; for routing="tile"
                a list with such a Routing per tile, in rows from the top. For a list of images a list of each.

        Returns:
            The image in the kind, mode and depth in which it came; of a path a PIL image, or for 16-bit colours, which
            Pillow does not have, a uint16 array. For a list a list.

        Raises:
            TypeError: something that is no image, or a setting of the wrong type.
            InputError: damaged, out of range, or too large for the memory.
            ConfigError: a setting out of range, or one that cannot take effect.
            WeightsError: the networks give NaN even in float32.
        """
        settings = Settings(
            scale=scale, strength=strength, tile=tile, color=color, color_strength=color_strength, routing=routing
        )
        settings.check_model(self.generator)
        several = isinstance(image, (list, tuple))
        results, routings = [], []
        for one in image if several else [image]:
            if isinstance(one, Tensor):
                lr = read_planes(one)
                rgb, found = self._restore_planes(lr, settings)
                results.append(rgb.to(device=one.device, dtype=one.dtype))
            else:
                [picture], found = self._restore_pictures([read(one)], settings)
                results.append(picture.to_kind())
            routings.append(found)
        images, found = (results, routings) if several else (results[0], routings[0])
        return (images, found) if return_routing else images

    @torch.no_grad()
    def restore_file(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        format: str | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> None:
        """Restore an image file into another file, which appears only when it is complete.

        Large PNG and TIFF outputs are written row by row, so that memory hardly grows with the image.

        Args:
            source: the image file.
            target: the file to write; its suffix determines the format, unless `format` does. Profile, EXIF and
                resolution are carried over.
            progress: called with (tiles done, tiles in all).
            settings: see `Settings`.

        Raises:
            InputError: as for the call, and a target that cannot be written, cannot hold the image, or is the source.
        """
        checked = Settings(**settings)
        checked.check_model(self.generator)
        if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
            raise InputError(f"{target}: the output would overwrite the input")
        picture = read(source)
        size = checked.output_size(*picture.size)
        name = check_output(picture, target, size, format)
        if name not in ("PNG", "TIFF") or not is_streamed(size):
            write(self._restore_pictures([picture], checked, progress)[0][0], target, format=format)
            return
        folder, top = Path(target).parent, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            canvas, _ = self._restore(picture.planes, checked, folder=folder, progress=progress)
            samples = Canvas((*size, picture.channels), picture.dtype, folder=folder)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
        for rows in finished_rows(canvas.tensor, picture.planes, checked):
            end = top + rows.shape[-2]
            alpha = None
            if picture.alpha is not None:
                alpha = enlarged_rows(torch.from_numpy(picture.alpha)[None, None], size, top, end)
            samples.values[top:end] = picture.samples(rows, alpha)
            canvas.release()
            samples.release()
            top = end
        del canvas
        write(picture, target, samples=samples, format=format)

    @torch.no_grad()
    def restore_pictures(self, pictures: Sequence[Picture], settings: Settings) -> list[Picture]:
        """Restore pictures of one size in one batch, each with its own routing.

        Raises:
            InputError, ConfigError, WeightsError: as for the call.
        """
        settings.check_model(self.generator)
        if len({picture.size for picture in pictures}) != 1:
            raise InputError(f"a batch takes pictures of one size, got {sorted({p.size for p in pictures})}")
        return self._restore_pictures(pictures, settings)[0]

    def _restore_pictures(
        self, pictures: Sequence[Picture], settings: Settings, progress: Progress | None = None
    ) -> tuple[list[Picture], Found]:
        """Restore pictures of one size, as many at once as the memory is expected to hold."""
        rgb, found = self._restore_planes(torch.cat([picture.rgb for picture in pictures]), settings, progress)
        results = []
        for picture, restored in zip(pictures, rgb.split(1), strict=True):
            alpha, (height, width) = picture.alpha_plane, restored.shape[-2:]
            if alpha is not None:
                alpha = enlarged_rows(alpha, (height, width), 0, height)
            results.append(picture.restored(restored, alpha))
        return results, found

    def _restore_planes(self, lr: Tensor, settings: Settings, progress: Progress | None = None) -> tuple[Tensor, Found]:
        """Restore images (B, 3, h, w), as many at once as the memory is expected to hold."""
        size = settings.output_size(*lr.shape[-2:])
        needed, free = OUTPUT_BYTES * size[0] * size[1] * len(lr), free_memory(torch.device("cpu"))
        if needed > free:
            raise InputError(
                f"an output of {size[1]} x {size[0]} needs about {needed / 2**30:.1f} GiB of memory and "
                f"{free / 2**30:.1f} GiB are free; take a smaller scale, or write PNG or TIFF files, which are streamed"
            )
        parts, found = [], []
        for some in lr.split(self.images_at_once(size, settings)):
            canvas, routing = self._restore(some, settings, progress=progress)
            parts.append(torch.cat(list(finished_rows(canvas.tensor, some, settings)), dim=-2))
            found.append(routing)
        return torch.cat(parts), _joined(found)

    def images_at_once(self, size: tuple[int, int], settings: Settings) -> int:
        """How many images of an output size go through the networks together; a processor gains nothing from more."""
        if self.device.type == "cpu" or settings.routing == "tile":
            return 1
        free = free_memory(self.device)
        plan = tiling(size, tile_side(self.generator, size, settings.tile, free), self.generator.multiple)
        return max(1, affordable_pixels(self.generator, free) // plan.pixels) if len(plan.windows) == 1 else 1

    def _restore(
        self,
        lr: Tensor,
        settings: Settings,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> tuple[Canvas, Found]:
        """What the networks make of images (B, 3, h, w), with smaller tiles when memory runs out, and the routing.

        Args:
            lr: floats in [0, 1], or uint8 or uint16 as fractions of their largest value.
            folder: of the canvas's file; None keeps the canvas in memory.
        """
        size = settings.output_size(*lr.shape[-2:])
        side = tile_side(self.generator, size, settings.tile, free_memory(self.device))
        while True:
            plan = tiling(size, side, self.generator.multiple)
            try:
                with self._alone():
                    canvas = Canvas((len(lr), 3, *size), folder=folder)
                    return canvas, self._restore_tiles(lr.to(self.device), canvas, plan, settings, progress)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # The failed pass's tensors live as long as its exception does, so memory is handed back only here.
            release_memory(self.device)
            side = plan.side // 2 // self.generator.multiple * self.generator.multiple
            if side < 2 * self.generator.multiple:
                raise InputError(f"memory ran out even with tiles of {plan.side} pixels; free some, or lower the batch")
            warnings.warn(f"memory ran out at {plan.side} pixels a side; trying tiles of {side}", stacklevel=3)

    def _restore_tiles(
        self, lr: Tensor, canvas: Canvas, plan: Tiling, settings: Settings, progress: Progress | None
    ) -> Found:
        size, windows = settings.output_size(*lr.shape[-2:]), plan.windows
        by_tile = settings.routing == "tile"
        with self._routed(lr, settings) as routing, self._merged(len(lr), len(windows), settings):
            found = []
            for done, window in enumerate(windows):
                if by_tile:
                    found.append(self._route(source_part(lr, window, size), settings))
                place = {"top": window.top, "left": window.left, "height": window.height, "width": window.width}
                enlarged = bicubic_window(lr, size, **place).clamp(0, 1)
                window.add(canvas.tensor, run_pass(self.generator, enlarged, self.dtype))
                if window is windows[-1] or windows[done + 1].top > window.top:
                    canvas.release()
                if progress is not None:
                    progress(done + 1, len(windows))
        return found if by_tile else routing

    @contextlib.contextmanager
    def _routed(self, lr: Tensor, settings: Settings) -> Iterator[Routing | None]:
        """The routing of an image for as long as the block lasts; then the model is as it was."""
        adapters = self.generator.adapters
        if adapters is None or not adapters.is_routed:
            yield None
            return
        before, adapters.strength = adapters.strength, settings.strength
        try:
            yield self._route(lr, settings) if settings.routing != "tile" else None
        finally:
            adapters.route(None)
            adapters.strength = before

    def _route(self, lr: Tensor, settings: Settings) -> Routing | None:
        adapters = self.generator.adapters
        if adapters is None or not adapters.is_routed:
            return None
        if isinstance(settings.routing, Routing):
            return adapters.route(_joined([settings.routing.to(self.device)] * len(lr)))
        self.generator.route(lr)
        return adapters.routing

    def _merged(self, batch: int, passes: int, settings: Settings) -> contextlib.AbstractContextManager[Any]:
        """Ranks in the weights where one image's passes repay it; decided once per image and network."""
        if self.generator.adapters is None or batch != 1 or settings.routing == "tile":
            return contextlib.nullcontext()
        base, stack = self.generator.backbone, contextlib.ExitStack()
        small = sum(weight.numel() for weight in base.unet.parameters()) < SMALL_NETWORK
        # The VAE encoder has few weights and many pixels; a large UNet repays its merge only over several tiles.
        for network in (base.vae, base.unet):
            if adapter_names(network) and (network is base.vae or small or passes >= MERGE_PASSES):
                stack.enter_context(merged(network))
        return stack

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        """Keep other threads off the generator inside a ``with`` block; the same thread may come in again."""
        with _NEW_LOCK:
            return _LOCKS.setdefault(self.generator, threading.RLock())


def is_streamed(size: tuple[int, int]) -> bool:
    """Whether a PNG or TIFF output of this height and width is written row by row."""
    return size[0] * size[1] > STREAM_PIXELS


def _joined(found: Sequence[Any]) -> Any:
    """Routings (L, B, …) of several batches as one; of lists of routings, one list."""
    if found[0] is None or len(found) == 1:
        return found[0]
    if isinstance(found[0], list):
        return [_joined(tile) for tile in zip(*found, strict=True)]
    return Routing(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))
