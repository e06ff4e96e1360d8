"""Any image in, the restored image out, in the same kind, mode and depth: the one callable that users of a model need.

Flow: picture → scores of the whole image → routing, once → merge → tiles → canvas → colour → the picture's own form.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from morsr.adapters import Routing
from morsr.adapters.merge import merged_layers
from morsr.errors import InputError
from morsr.files import check_writable
from morsr.functional.resample import bicubic_window, unit_range
from morsr.imaging import Canvas, Picture, read, write
from morsr.imaging.files import check_output, read_planes
from morsr.restoring.devices import free_memory, is_out_of_memory, resolve_device, resolve_dtype
from morsr.restoring.settings import Settings
from morsr.restoring.tiles import enlarged_rows, finished_rows, run_pass, tile_side, tiling

if TYPE_CHECKING:
    from morsr.adapters.inject import RouterFactory
    from morsr.estimators import DegradationEstimator
    from morsr.models.bases import Base
    from morsr.models.generator import OneStepGenerator

Progress = Callable[[int, int], None]

STREAM_PIXELS = 16_000_000  # larger outputs of files are held in unnamed files instead of memory
OUTPUT_BYTES = 40  # main memory per pixel of an output that is held: canvas, finished rows, and samples made of them

SMALL_NETWORK = 100_000_000  # adapted weights of a UNet below which a merge costs less than the ranks of a single pass
RELEASE_EVERY = 8  # tiles after which the memory of a canvas in a file is given back
MERGE_PASSES = 8  # tiles of an image from which a merge of a larger UNet is repaid

# A generator has one routing for all who use it, and merges change its weights: one lock for all restorers of it.
_LOCKS: WeakKeyDictionary[OneStepGenerator, threading.RLock] = WeakKeyDictionary()


class Restorer:
    """Restore images with a one-step generator. Calls from several threads wait for each other.

    Args:
        generator: put into eval mode and onto the device.
        device: where it runs; "auto" takes the machine's accelerator if there is one.
        dtype: precision of the networks: "auto" (bfloat16 or float16 on an accelerator, float32 on a processor), or a
            torch dtype or its name. Weights stay as they are; routing, scores and the clean latents are always float32.

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
    ) -> None:
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.generator = generator.eval().to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] = "tiny",
        *,
        base: Base | str | os.PathLike[str] | None = None,
        prompt: str | None = None,
        estimator: DegradationEstimator | str | None = None,
        router: RouterFactory | str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        **hub: Any,
    ) -> Restorer:
        """Load a trained model.

        Args:
            name_or_path: a shipped preset ("tiny"), an adapters .safetensors, a saved folder, a training .ckpt, or the
                hub id of a saved folder.
            base: folder or hub id of the base model, where the adapters do not bring it, or one of your own.
            prompt: text instead of the prompt that comes with the model; needs the base's text encoder.
            estimator: one of your own, or its class path; or the folder or hub id of CLIP's weights.
            router: class of the router, or its path, where it is one of your own.
            device, dtype: see the class.
            hub: revision, cache_dir, token and local_files_only, as `huggingface_hub.snapshot_download` takes them.

        Raises:
            WeightsError: missing or damaged weights, adapters of another base, or a prompt without a text encoder.
            ConfigError: an estimator with other scores.
        """
        from morsr.models.loading import load_generator

        resolve_dtype(dtype, resolve_device(device))  # a wrong setting is refused before seconds of loading
        generator = load_generator(name_or_path, base=base, prompt=prompt, estimator=estimator, router=router, **hub)
        return cls(generator, device=device, dtype=dtype)

    def save_pretrained(self, folder: str | os.PathLike[str], *, include_base: bool | None = None) -> Path:
        """Write the model as a folder for `from_pretrained`, here or, uploaded, from the hub.

        Args:
            folder: made if it is not there; files of an earlier save are replaced.
            include_base: put the base's weights in; default only where no preset or hub id names it. Those of a base
                that was made by hand are always put in, those of a class of your own never.

        Raises:
            InputError, ConfigError: a folder that is a file, or parts that cannot be described.
            WeightsError: adapters that hold NaN or infinity; what was in the folder stays.
        """
        from morsr.models.saving import save_generator

        with self._alone():  # else another thread's merge could be written
            return save_generator(folder, self.generator, include_base=include_base)

    def _alone(self) -> threading.RLock:
        return _LOCKS.setdefault(self.generator, threading.RLock())

    def __repr__(self) -> str:
        generator, adapters = self.generator, "no adapters"
        if generator.adapters is not None:
            config, layers = generator.adapters.config, len(generator.adapters.layer_names)
            adapters = f"{config.num_ranks} ranks in {layers} layers"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Restorer(base {generator.base.base_id!r}, {adapters}, {self.device}, {dtype})"

    def __call__(
        self,
        image: Any,
        scale: float = 4.0,
        *,
        strength: float = 1.0,
        tile: int | Literal["auto"] | None = "auto",
        color: Literal["wavelet", "adain", "none"] = "wavelet",
        color_strength: float = 1.0,
        routing: Routing | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Restore an image, a list of images, or a batch of equal size as a tensor.

        Args:
            image: path, PIL image, numpy array (H, W) or (H, W, C) of uint8, uint16 or floats in [0, 1], tensor
                (B, 3, H, W) of floats in [0, 1], or a list of these. Alpha is enlarged beside the colours.
            scale, strength, tile, color, color_strength, routing: see `Settings`.
            return_routing: return (image, Routing) instead, with one routing per image of a batch; for a list of images
                a list of each.

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
        results: list[Any] = []
        routings: list[Any] = []
        for one in image if several else [image]:
            if isinstance(one, Tensor):
                planes = read_planes(one).permute(0, 2, 3, 1).cpu().numpy()
                parts = [self.restore(Picture(samples=each), settings) for each in planes]
                results.append(torch.cat([part.planes for part, _ in parts]).to(one).contiguous())
                routed = [of_one for _, of_one in parts if of_one is not None]
                found = Routing(*(torch.cat(part, dim=1) for part in zip(*routed, strict=True))) if routed else None
            elif isinstance(one, (str, os.PathLike, Image.Image, np.ndarray)):
                result, found = self.restore(read(one), settings)
                results.append(result.like(one))
            else:
                raise TypeError(f"image: expected a path, PIL image, array, tensor or a list, got {type(one).__name__}")
            routings.append(found)
        images = results if several else results[0]
        return (images, routings if several else routings[0]) if return_routing else images

    def restore_file(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        **settings: Any,
    ) -> None:
        """Restore an image file into another file, written atomically.

        Large outputs pass through unnamed files beside the target, so that memory hardly grows with the image.

        Args:
            source: the image file.
            target: the file to write; its suffix determines the format. Profile, EXIF and resolution are carried over.
            progress: called with (tiles done, tiles in all).
            settings: see `Settings`.

        Raises:
            InputError: as for the call, and a target that cannot be written, cannot hold the image, or is the source.
        """
        checked = Settings(**settings)
        checked.check_model(self.generator)
        if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
            raise InputError(f"{target}: the output would overwrite the input")
        picture, folder = read(source), None
        size = checked.output_size(*picture.size)
        check_output(picture, target, size)
        try:
            check_writable(Path(target).parent)
            if size[0] * size[1] > STREAM_PIXELS:
                folder = Path(target).parent
                folder.mkdir(parents=True, exist_ok=True)
            restored, _ = self.restore(picture, checked, folder=folder, progress=progress)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
        write(restored, target)

    @torch.no_grad()
    def restore(
        self, picture: Picture, settings: Settings, *, folder: Path | None = None, progress: Progress | None = None
    ) -> tuple[Picture, Routing | None]:
        """Restore a picture by settings that fit the model.

        Args:
            picture: alpha is enlarged beside the colours.
            settings: see `Settings`.
            folder: of the unnamed files that hold the output; None holds it in memory.
            progress: called with (tiles done, tiles in all).
        """
        lr, size, top = picture.planes, settings.output_size(*picture.size), 0
        needed, free = OUTPUT_BYTES * size[0] * size[1], free_memory(torch.device("cpu"))
        if folder is None and needed > free:
            raise InputError(
                f"an output of {size[1]} x {size[0]} needs about {needed / 2**30:.1f} GiB of memory and "
                f"{free / 2**30:.1f} GiB are free; take a smaller scale, or write a file by restore_file"
            )
        with self._alone():  # from the choice of tiles on, which goes by the memory that is free
            canvas, routing = self._run(lr, settings, folder, progress)
        samples = Canvas((*size, picture.samples.shape[2]), picture.samples.dtype, folder=folder)
        for rows in finished_rows(canvas.tensor, lr, settings):
            end, alpha = top + rows.shape[-2], picture.alpha_plane
            alpha = None if alpha is None else enlarged_rows(alpha, size, top, end)
            samples.values[top:end] = picture.encoded(rows, alpha)
            canvas.release()
            samples.release()
            top = end
        return replace(picture, samples=samples.values, canvas=samples), routing

    def _run(
        self, lr: Tensor, settings: Settings, folder: Path | None, progress: Progress | None
    ) -> tuple[Canvas, Routing | None]:
        """What the networks make of an image (1, 3, h, w), with smaller tiles when memory runs out, and the routing.

        Args:
            lr: floats in [0, 1], or uint8 or uint16 as fractions of their largest value.
            folder: of the canvas's file; None keeps the canvas in memory.
        """
        size, shrink = settings.output_size(*lr.shape[-2:]), self.generator.one_step.shrink(settings.scale)
        fine, multiple = (size[0] * shrink, size[1] * shrink), self.generator.base.multiple
        free = free_memory(self.device)
        side = tile_side(self.generator, fine, settings.tile, free)
        while True:
            windows = tiling(fine, side, math.lcm(multiple, shrink))
            try:
                canvas, image = Canvas((1, 3, *size), folder=folder), lr.to(self.device)
                with self._routed(image, settings) as routing, self._merged(len(windows), free):
                    for done, window in enumerate(windows):
                        place = {"top": window.top, "left": window.left, "height": window.height, "width": window.width}
                        enlarged = bicubic_window(image, fine, **place).clamp(0, 1)
                        window.add(canvas.tensor, run_pass(self.generator, enlarged, self.dtype), shrink)
                        if done % RELEASE_EVERY == 0:
                            canvas.release()
                        if progress is not None:
                            progress(done + 1, len(windows))
                return canvas, routing
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # The failed pass's tensors live as long as its exception does, so memory is handed back only here.
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()
            tried = max(windows[0].height, windows[0].width)
            side = tried // 2 // multiple * multiple
            if side < 2 * multiple:
                raise InputError(f"memory ran out even with tiles of {tried} pixels; free some")
            warnings.warn(f"memory ran out at {tried} pixels a side; trying tiles of {side}", stacklevel=3)

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
    def _merged(self, passes: int, free: int) -> Iterator[None]:
        """Ranks in the weights where one image's passes repay it; decided once per image and network."""
        report = self.generator.adapters
        with contextlib.ExitStack() as stack:
            if report is not None and report.switch.active == report.name:
                named = list(zip(report.layer_names, report.layers, strict=True))
                # The VAE encoder has few weights and many pixels; a large UNet repays its merge over several tiles.
                for of_vae in (True, False):
                    layers = [layer for name, layer in named if name.startswith("vae.") == of_vae]
                    small = sum(layer.weight.numel() for layer in layers) < SMALL_NETWORK
                    # A second copy of the weights has to fit, with room for a pass; else ranks are masked.
                    free -= 2 * sum(layer.weight.nbytes for layer in layers)
                    if free > 0 and (of_vae or small or passes >= MERGE_PASSES):
                        stack.enter_context(merged_layers(layers, report.name))
            yield
