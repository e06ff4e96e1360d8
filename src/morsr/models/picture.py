"""One picture as networks see it, RGB in [0, 1] beside its alpha, and the way back to what it came as.

A `Picture` is made from a file, a PIL image, a numpy array or a tensor, and keeps in its `Form` all that is needed to
give the restored picture back in the same kind, mode and depth. Files are read and written in picture_files.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

from morsr.errors import InputError, MorsrError, check_images
from morsr.functional.checksums import check_png
from morsr.functional.resample import unit_range

LUMA = (0.299, 0.587, 0.114)
ORIENTATION_TAG = 0x0112
CHANNELS = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 3, "PA": 4, "CMYK": 4, "YCbCr": 3, "HSV": 3}
_BITS, _WHITE = 258, 262  # tags of TIFF: bits per sample; 0 where white is 0, which Pillow heeds in 8 bits only
_NOT_INFO = ("icc_profile", "exif", "transparency")
_READ_AS = {"P": "RGB", "PA": "RGBA", "RGBX": "RGB", "RGBa": "RGBA", "La": "LA", "YCbCr": "RGB", "HSV": "RGB"}


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a picture came, and how it goes back.

    Attributes:
        kind: what it came as.
        mode: "1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr" or "HSV"; the depth is not part of it.
        depth: bits per sample: 8, 16, or 32 for floating point.
        orientation: EXIF orientation (1 to 8) of the stored pixels; a Picture is always upright.
        format: Pillow's name of the file format, or None.
        icc, exif: the profile and EXIF data as stored.
        info: what else the file said: text, resolution, XMP, compression.
        array_rank, array_dtype, device: of a numpy array or a tensor.
    """

    kind: Literal["file", "pil", "numpy", "tensor"]
    mode: str = "RGB"
    depth: int = 8
    orientation: int = 1
    format: str | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    array_rank: int = 3
    array_dtype: Any = None
    device: torch.device | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An upright picture as tensors.

    Attributes:
        rgb: (B, 3, H, W) float32 in [0, 1]; B is 1 for all kinds but tensors. Of a file that was read compactly: uint8
            or uint16, as fractions of their largest value, like alpha then.
        alpha: (B, 1, H, W) float32 in [0, 1], or None.
        black: the K plate of a CMYK picture, like alpha.
        form: how it came.
    """

    rgb: Tensor
    form: Form
    alpha: Tensor | None = None
    black: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        return self.rgb.shape[-2], self.rgb.shape[-1]

    def replaced(self, rgb: Tensor, alpha: Tensor | None = None, black: Tensor | None = None) -> Picture:
        """The same form with other pixels; alpha and black must come if and only if the picture has them."""
        if (alpha is None) != (self.alpha is None) or (black is None) != (self.black is None):
            raise InputError("picture: alpha and black plates must be replaced together with the colours")
        return replace(self, rgb=rgb, alpha=alpha, black=black)

    def with_form(self, form: Form) -> Picture:
        """The same pixels in another form; alpha goes if the form's mode has none."""
        alpha = self.alpha if form.mode in ("LA", "PA", "RGBA") else None
        return replace(self, form=form, alpha=alpha)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Picture:
        """The same picture with every plane where `move` puts it."""
        alpha, black = (None if plane is None else move(plane) for plane in (self.alpha, self.black))
        return replace(self, rgb=move(self.rgb), alpha=alpha, black=black)

    def expanded(self) -> Picture:
        """The same picture as floats, if it was read compactly."""
        if self.rgb.is_floating_point():
            return self
        alpha = None if self.alpha is None else unit_range(self.alpha)
        return replace(self, rgb=unit_range(self.rgb).contiguous(), alpha=alpha)

    def to_kind(self) -> Any:
        """Return the picture as what it came as; a file comes back as a PIL image, or, since Pillow knows no colours
        of 16 bits, as a uint16 array (H, W, C)."""
        if self.form.kind == "tensor":
            return self.rgb.to(device=self.form.device, dtype=self.form.array_dtype)
        samples = to_samples(self)
        if self.form.kind == "numpy":
            samples = samples.astype(self.form.array_dtype, copy=False)  # in the byte order in which it came
            return samples.reshape(samples.shape[:2]) if self.form.array_rank == 2 else samples
        if self.form.depth == 16 and samples.shape[-1] > 1:
            return samples
        return to_pil(self)


def read_picture(image: Any, *, max_pixels: int | None = None) -> Picture:
    """Read a picture from whatever a person has.

    Args:
        image: path to a file, PIL image, numpy array (H, W) or (H, W, C) of uint8, uint16 or floats in [0, 1] with 1 to
            4 channels, or tensor (B, 3, H, W) of floats in [0, 1].
        max_pixels: more pixels than this are refused before they are decoded; see `picture_files.MAX_PIXELS`.

    Raises:
        InputError: anything that is not one still picture with finite values in range; the message says why.
    """
    if isinstance(image, Picture):
        return image
    if isinstance(image, Tensor):
        check_images(image)
        form = Form(kind="tensor", array_dtype=image.dtype, device=image.device)
        return Picture(rgb=image.detach().float().clamp(0, 1), form=form)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        try:
            return from_pil(image)
        except MorsrError:
            raise
        except Exception as error:  # a lazily opened file is decoded only here, and decoders raise anything
            raise InputError(f"the PIL image cannot be decoded: {error}") from error
    if isinstance(image, (str, os.PathLike)):
        from morsr.models.picture_files import MAX_PIXELS, read_file

        return read_file(image, max_pixels=MAX_PIXELS if max_pixels is None else max_pixels)
    raise InputError(f"expected a path, PIL image, numpy array or tensor, got {type(image).__name__}")


def _from_array(array: NDArray[Any]) -> Picture:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise InputError(f"array: expected shape (H, W) or (H, W, C) with 1 to 4 channels, got {array.shape}")
    if 0 in array.shape:
        raise InputError(f"array: expected at least one pixel, got shape {array.shape}")
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"array: expected uint8, uint16 or floats in [0, 1], got {array.dtype}")
    mode = ("L", "LA", "RGB", "RGBA")[(1 if array.ndim == 2 else array.shape[2]) - 1]
    depth = {1: 8, 2: 16}[array.dtype.itemsize] if array.dtype.kind == "u" else 32
    form = Form(kind="numpy", mode=mode, depth=depth, array_rank=array.ndim, array_dtype=array.dtype)
    return from_samples(array, form)


def from_samples(samples: NDArray[Any], form: Form, *, compact: bool = False) -> Picture:
    """Make an upright picture of stored samples (H, W) or (H, W, C) of one of the modes, as `form` describes them.

    Args:
        compact: keep whole numbers as they are where the mode allows it, a quarter of the memory.
    """
    if samples.ndim == 2:
        samples = samples[..., None]
    if compact and samples.dtype.kind == "u" and form.mode != "CMYK":
        planes = orient(torch.from_numpy(samples).permute(2, 0, 1)[None], form.orientation)
    elif samples.dtype.kind == "u":
        values = torch.from_numpy(samples.astype(np.float32)).div_(float(np.iinfo(samples.dtype).max))
        planes = orient(values.permute(2, 0, 1)[None], form.orientation)
    else:
        planes = orient(torch.from_numpy(samples.astype(np.float32)).permute(2, 0, 1)[None], form.orientation)
        check_images(planes, name="picture", channels=None)
        planes = planes.clamp(0, 1)
    if form.mode == "CMYK":
        black = planes[:, 3:]
        return Picture(rgb=(1 - planes[:, :3]) * (1 - black), black=black, form=form)
    alpha = planes[:, -1:] if planes.shape[1] in (2, 4) else None
    rgb = planes[:, :3] if planes.shape[1] >= 3 else planes[:, :1].expand(-1, 3, -1, -1)
    return Picture(rgb=rgb if compact else rgb.contiguous(), alpha=alpha, form=form)


def to_planes(picture: Picture) -> Tensor:
    """The picture's sample planes (B, C, H, W) in [0, 1], upright: gray for gray modes, CMYK for CMYK, alpha last."""
    rgb, mode = picture.rgb, picture.form.mode
    if mode == "CMYK":
        assert picture.black is not None
        # Less black wherever a restored pixel is brighter than the plate allows; then the other plates follow exactly.
        black = torch.minimum(picture.black, 1 - rgb.amax(dim=1, keepdim=True)).clamp(0, 1)
        return torch.cat([(1 - rgb / (1 - black).clamp(min=1e-6)).clamp(0, 1), black], dim=1)
    if mode in ("1", "L", "LA"):
        rgb = (rgb * rgb.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    return rgb if picture.alpha is None else torch.cat([rgb, picture.alpha], dim=1)


def to_samples(picture: Picture) -> NDArray[Any]:
    """The picture's samples (H, W, C), stored orientation and depth, without quantisation to a palette."""
    planes = orient(to_planes(picture), inverse_orientation(picture.form.orientation))
    return planes_to_samples(planes[0], picture.form)


def planes_to_samples(planes: Tensor, form: Form) -> NDArray[Any]:
    """Planes (C, H, W) in [0, 1] as samples (H, W, C) of the form's depth."""
    values = planes.permute(1, 2, 0).clamp(0, 1).cpu()
    if form.depth == 32:
        return values.numpy().astype(form.array_dtype or np.float32)
    kind = np.uint8 if form.depth == 8 else np.uint16
    return (values * float(np.iinfo(kind).max)).round().numpy().astype(kind)


def from_pil(image: Image.Image, *, kind: Literal["file", "pil"] = "pil", compact: bool = False) -> Picture:
    """Read a PIL image of any mode but LAB.

    Args:
        kind: what the picture is to go back as.
        compact: see `from_samples`.

    Raises:
        InputError: animated or multi-page images, 32-bit samples out of range, a mode that cannot be used.
    """
    # Cameras append previews and depth maps to a JPEG; the photograph is the first picture of such an MPO file.
    frames = getattr(image, "n_frames", 1)
    if image.format != "MPO" and frames > 1:
        raise InputError(f"the image has {frames} frames or pages; split it and give one at a time")
    source = getattr(image, "fp", None)
    if image.format == "PNG" and source is not None and not source.closed:
        check_png(source)
    image.load()  # first: asking a PNG for its orientation decodes it too, and hides what is damaged
    orientation = stored_orientation(image)  # of a TIFF 1, for Pillow turns it upright while it loads
    if 0 in image.size:
        raise InputError(f"expected at least one pixel, got {image.size[0]} x {image.size[1]}")
    mode, depth = image.mode, 8
    samples: NDArray[Any]
    if mode in ("I", "F") or mode.startswith("I;16"):
        samples, depth = _deep_gray(image)
        mode, clear = "L", image.info.get("transparency")
        if isinstance(clear, int) and depth == 16:  # PNG names one gray value that is not seen
            samples, mode = np.stack([samples, np.where(samples == clear, 0, 65535).astype(np.uint16)], axis=-1), "LA"
    else:
        if mode == "LAB":
            raise InputError("LAB images are not supported; convert to RGB first")
        transparent = "transparency" in image.info and mode in ("1", "L", "P", "RGB")
        if mode == "P" and image.palette is not None and image.palette.mode == "RGBA":
            transparent |= min((image.getpalette("RGBA") or [])[3::4], default=255) < 255
        if transparent:
            read_as = "LA" if mode in ("1", "L") else "RGBA"
            mode = "PA" if mode == "P" else read_as
        else:
            mode = {"RGBX": "RGB", "RGBa": "RGBA", "La": "LA"}.get(mode, mode)
            read_as = _READ_AS.get(image.mode, mode)
        if mode not in CHANNELS:
            raise InputError(f"images of mode {image.mode} are not supported; convert to RGB first")
        samples = np.array(image if image.mode == read_as else image.convert(read_as))
        if samples.dtype == bool:
            samples = samples.astype(np.uint8) * 255
    form = Form(
        kind=kind,
        mode=mode,
        depth=depth,
        orientation=orientation,
        format=image.format,
        icc=image.info.get("icc_profile"),
        exif=image.info.get("exif"),
        info={str(key): value for key, value in image.info.items() if key not in _NOT_INFO},
        array_dtype=np.float32 if depth == 32 else None,
    )
    return from_samples(samples, form, compact=compact)


def _deep_gray(image: Image.Image) -> tuple[NDArray[Any], int]:
    samples, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        return (1 - samples if tags.get(_WHITE) == 0 else samples), 32
    samples = tiff_gray(samples, tags)
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > 65535:
        raise InputError(f"expected gray values of 16 bits, got {low} to {high}")
    return samples.astype(np.uint16), 16


def tiff_gray(samples: NDArray[Any], tags: Mapping[int, Any]) -> NDArray[Any]:
    """Gray values above 8 bits on the scale of 16 bits with black at 0; Pillow leaves them as a TIFF stores them."""
    if tags.get(_BITS) == (12,):
        samples = np.rint(samples * (65535 / 4095))
    return 65535 - samples if tags.get(_WHITE) == 0 else samples


def stored_orientation(image: Image.Image) -> int:
    """The EXIF orientation (1 to 8) of an opened image; 1 where there is none that makes sense."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF is no reason to refuse a photograph
        return 1
    return value if value in range(1, 9) else 1


def to_pil(picture: Picture) -> Image.Image:
    """The picture as a PIL image of its mode, in stored orientation, with profile, EXIF and the rest in `info`."""
    form = picture.form
    samples = to_samples(picture)
    if form.depth == 16 and samples.shape[-1] > 1:
        raise InputError("Pillow holds no 16-bit colours")
    if form.mode == "CMYK":
        image = Image.frombytes("CMYK", samples.shape[1::-1], samples.tobytes())
    else:
        image = Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples)
    if form.mode == "1":
        # A threshold keeps line art and text crisp where dithering would sprinkle their smoothed edges.
        image = image.point([0] * 128 + [255] * 128, mode="1")
    elif form.mode == "P":
        image = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
    elif form.mode == "PA":
        image = _quantize_alpha(image, soft=form.format != "GIF")
    elif image.mode != form.mode and form.mode in ("YCbCr", "HSV"):
        image = image.convert(form.mode)
    for key, value in (("icc_profile", form.icc), ("exif", resized_exif(form, image.size))):
        if value:
            image.info[key] = value
    image.info.update({key: value for key, value in form.info.items() if key not in image.info})
    return image


def _quantize_alpha(image: Image.Image, *, soft: bool = True) -> Image.Image:
    """Reduce RGBA to a palette: on/off transparency keeps one entry for "clear", soft transparency a joint palette.

    Args:
        soft: whether there may be soft transparency; GIF has none.
    """
    alpha = np.asarray(image.getchannel("A"))
    if soft and np.mean((alpha > 16) & (alpha < 239)) > 0.1:
        return image.quantize(256, method=Image.Quantize.FASTOCTREE)
    palette = image.convert("RGB").quantize(255, method=Image.Quantize.MEDIANCUT)
    clear = len(palette.getpalette() or ()) // 3
    entries = np.where(alpha < 128, clear, np.asarray(palette)).astype(np.uint8)
    result = Image.frombytes("P", image.size, entries.tobytes())
    result.putpalette([*(palette.getpalette() or ()), 0, 0, 0])
    result.info["transparency"] = clear
    return result


def cmyk_to_srgb(picture: Picture) -> Tensor:
    """RGB planes of a CMYK picture by its own profile, for formats without CMYK; naively if the profile is broken."""
    try:
        profile = ImageCms.ImageCmsProfile(BytesIO(picture.form.icc or b""))
        upright = replace(picture, form=replace(picture.form, orientation=1))
        image = ImageCms.profileToProfile(to_pil(upright), profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return from_samples(np.asarray(image), Form(kind="file")).rgb
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture.rgb


def parse_exif(data: bytes | None) -> Image.Exif | None:
    """EXIF data as a table, or None if there are none or they cannot be parsed."""
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif.load(data or b"")
            # Pillow parses lazily; whatever is broken is to break here.
            return exif if len(exif) and exif.tobytes() else None
        except Exception:  # third-party EXIF breaks its parser in many ways
            return None


def resized_exif(form: Form, size: tuple[int, int]) -> bytes | None:
    """The form's EXIF data with the new width and height; data that cannot be parsed stay as they are."""
    exif = parse_exif(form.exif)
    if exif is None:
        return form.exif
    try:
        tables: list[tuple[Any, int, int]] = [(exif, 0x0100, 0x0101)]
        if 0x8769 in exif:  # asking for a table makes it
            tables.append((exif.get_ifd(0x8769), 0xA002, 0xA003))
        for table, width_tag, height_tag in tables:
            if width_tag in table:
                table[width_tag], table[height_tag] = size
        return exif.tobytes()
    except Exception:  # what could be read cannot always be written again, and is worth keeping all the same
        return form.exif


def orient(planes: Tensor, orientation: int) -> Tensor:
    """Turn stored pixels (..., H, W) of an EXIF orientation upright."""
    if orientation in (5, 6, 7, 8):
        planes = planes.transpose(-2, -1)
    flips = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}.get(orientation)
    return planes.flip(flips) if flips else planes


def inverse_orientation(orientation: int) -> int:
    """The orientation that undoes another: the two quarter turns change places."""
    return {6: 8, 8: 6}.get(orientation, orientation)
