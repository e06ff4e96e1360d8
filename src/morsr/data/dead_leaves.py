"""Dead leaves: endless synthetic photographs, rendered on the device.

Random opaque shapes with power-law radii (density r^-3, so that every octave of sizes covers the same area) hide one
another in a random depth order. That alone gives images the edge statistics and the 1/f spectrum of photographs; each
shape also gets a colour of the image's palette, soft shading, and a texture (1/f noise or a grating).

Shapes are drawn in layers: a layer is a grid of cells with one shape inside each, evaluated as one dense image. The
buffer `top` keeps the largest (depth, shape) number of all layers for every subpixel. Everything random is a hash of
(key, counter): an image depends on its key alone, not on batch mates or the device.

Dimensions: B images, N shapes, C canvas side (2 x size).

Source: Lee, Mumford, Huang, "Occlusion models for natural images" (IJCV 2001); networks trained on such images come
close to those trained on photographs (Achddou, Gousseau, Ladjal, "Synthetic images as a regularity prior", 2021).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.degradation.keys import STEP, mix

_SUPERSAMPLE = 2
_SMALLEST_RADIUS = 2.5  # of the finest shapes, in canvas pixels
_LARGEST_RADIUS = 0.8  # of the coarsest shapes, in canvas sides
_LAYERS_PER_OCTAVE = 4
_CELL = 2.4  # cell side over the largest radius in it: room for the shape to move
_COLOURS, _FIELDS = 12, 4  # of one image's palette; noise fields per image
# Rendered at once: on a CPU what stays in its cache; an accelerator wants few, large launches.
_SUBPIXELS_CPU, _SUBPIXELS = 2**18, 2**24


class _Draws:
    """Uniform numbers in [0, 1) per image; each call takes the next counters of every image's own stream."""

    def __init__(self, keys: Tensor) -> None:
        self.base_B1 = mix(keys + STEP)[:, None]
        self.used = 0

    def __call__(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        counters = torch.arange(self.used, self.used + count, device=self.base_B1.device)
        self.used += count
        bits = mix(self.base_B1 + (counters + 1) * STEP)
        uniform = ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
        return uniform.reshape(-1, *shape)


@torch.no_grad()
def dead_leaves(keys: Tensor, size: int) -> Tensor:
    """Render dead-leaves images, float32 (B, 3, size, size) in [0, 1], on the device of their keys.

    Args:
        keys: int64 (B,), one per image; equal keys give equal images of one size.
        size: height and width in pixels, at least 16.
    """
    subpixels = _SUBPIXELS_CPU if keys.device.type == "cpu" else _SUBPIXELS
    chunk = max(1, subpixels // (_SUPERSAMPLE * size) ** 2)
    return torch.cat([_render(part, size) for part in keys.split(chunk)])


def _render(keys: Tensor, size: int) -> Tensor:
    canvas, draws = _SUPERSAMPLE * size, _Draws(keys)
    style = draws(8)
    # The finest shapes of an image are between the finest possible and an eighth of the canvas, most often fine.
    smallest = _SMALLEST_RADIUS * (canvas / 8 / _SMALLEST_RADIUS) ** (style[:, 0:1] ** 1.3)
    present = 0.35 + 0.65 * style[:, 1:2]
    top = torch.zeros(len(keys), canvas, canvas, dtype=torch.int64, device=keys.device)
    background = torch.tensor([[canvas / 2], [canvas / 2], [canvas]], device=keys.device)
    geometry, first = [background.expand(len(keys), 3, 1)], 1  # centre x, y and radius of every shape
    layers = round(_LAYERS_PER_OCTAVE * math.log2(_LARGEST_RADIUS * canvas / (1.4 * _SMALLEST_RADIUS)))
    for number in range(layers):
        largest = _LARGEST_RADIUS * canvas * 2 ** (-number / _LAYERS_PER_OCTAVE)
        cell = max(4, round(_CELL * largest))
        side = math.ceil(canvas / cell) + 1
        random = draws(7, side * side)
        # power law r^-3 within the layer's half octave, by its inverse cumulative distribution
        radius = largest * (1 + random[:, 0]).rsqrt()
        shown = (radius >= smallest) & (random[:, 1] < present)
        shapes = torch.arange(first, first + side * side, device=keys.device)
        rank = (((random[:, 2] * 2**30).long() + 1 << 32) + shapes) * shown
        geometry.append(_draw_layer(top, rank, radius, random[:, 3:], cell=cell, side=side, number=number))
        first += side * side
    image = _paint((top & (2**32 - 1)).flatten(1), torch.cat(geometry, dim=2), style, draws)
    return F.avg_pool2d(image, _SUPERSAMPLE).clamp(0, 1)


def _draw_layer(
    top: Tensor, rank: Tensor, radius: Tensor, random: Tensor, *, cell: int, side: int, number: int
) -> Tensor:
    """Draw one shape per cell (side x side cells) into `top` (B, C, C); their centres x, y and radii (B, 3, N)."""
    # a fixed low-discrepancy offset per layer keeps the cells of different layers from lining up
    offset_x, offset_y = (int(cell * ((number + 1) * step % 1.0)) for step in (0.7548776662, 0.5698402910))
    room = (cell / 2 - radius).clamp_min(0)
    centre_x, centre_y = (cell / 2 + (2 * random[:, axis] - 1) * room for axis in (0, 1))  # within the cell
    cell_index = torch.arange(side * side, device=top.device)
    placed = torch.stack([centre_x + cell_index % side * cell - offset_x,
                          centre_y + cell_index // side * cell - offset_y, radius], dim=1)  # fmt: skip
    if top.device.type == "cpu" and not rank.any():  # asking costs an accelerator a pause, a CPU nothing
        return placed
    axis = torch.arange(top.shape[-1], device=top.device)
    column, row = (axis + offset_x) // cell, (axis + offset_y) // cell

    def at(values: Tensor) -> Tensor:
        """A value of every shape (B, N) at every subpixel (B, C, C)."""
        return values.unflatten(1, (side, side)).index_select(1, row).index_select(2, column)

    x = (axis + offset_x) % cell + 0.5 - at(centre_x)
    y = ((axis + offset_y) % cell + 0.5)[:, None] - at(centre_y)
    angle, narrow = 2 * math.pi * random[:, 2], 1 + 3 * random[:, 3] ** 2
    cos, sin = at(angle.cos() / radius), at(angle.sin() / radius)
    u, v = x * cos + y * sin, (y * cos - x * sin) * at(narrow)
    if number % 3 == 0:
        inside = u.square_() + v.square_() < 1  # ellipses
    elif number % 3 == 1:
        inside = torch.maximum(u.abs_(), v.abs_()) < 0.7  # rectangles
    else:
        inside = torch.maximum(v, 0.866 * u.abs_() - 0.5 * v) < 0.5  # triangles
    torch.maximum(top, at(rank) * inside, out=top)
    return placed


def _noise_fields(draws: _Draws, canvas: int) -> Tensor:
    """Tileable noise (B, fields, S, S) of zero mean and unit deviation with spectra 1/f^a, from rough to smooth."""
    side = min(256, 2 ** (canvas - 1).bit_length())
    white = draws(_FIELDS, side, side) - 0.5
    across, down = (frequencies(side, device=white.device) for frequencies in (torch.fft.rfftfreq, torch.fft.fftfreq))
    frequency = (down[:, None].square() + across.square()).sqrt()
    frequency[0, 0] = math.inf
    exponents = torch.linspace(0.5, 1.7, _FIELDS, device=white.device)[:, None, None]
    fields = torch.fft.irfft2(torch.fft.rfft2(white) * frequency**-exponents, s=(side, side))
    return fields / fields.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-6)


def _palette(draws: _Draws, style: Tensor, shapes: int) -> Tensor:
    """Colours (B, 3, N) out of few per image: strong in lightness, weak in hue."""
    entries, jitter = draws(3, _COLOURS), draws(3, shapes)
    pick = (draws(shapes) * _COLOURS).long()
    light, warm, green = (entries[:, row].gather(1, pick) for row in range(3))
    light = (light + 0.35 * (jitter[:, 0] - 0.5)).clamp(0.01, 0.99) ** (0.7 + 1.1 * style[:, 2:3])
    chroma = (0.3 + 1.4 * style[:, 3:4]) * (light * (1 - light) * 4).clamp(0.25, 1) * (0.6 + 0.8 * jitter[:, 1])
    warm = 0.5 * chroma * (warm - 0.5 + 0.3 * (style[:, 4:5] - 0.5))
    green = 0.25 * chroma * (green - 0.5 + 0.3 * (style[:, 5:6] - 0.5)) + 0.03 * (jitter[:, 2] - 0.5)
    return torch.stack([light + warm, light + green, light - warm], dim=1)


def _paint(shape_of_pixel: Tensor, geometry: Tensor, style: Tensor, draws: _Draws) -> Tensor:
    """Colour every subpixel by its shape: (B, C * C) shape numbers -> image (B, 3, C, C)."""
    centre_x, centre_y, radius = geometry.unbind(1)
    canvas = math.isqrt(shape_of_pixel.shape[1])
    colour, random = _palette(draws, style, geometry.shape[2]), draws(9, geometry.shape[2]).unbind(1)
    # shading: a ramp across most shapes
    turn = 2 * math.pi * random[0]
    shade = 0.35 * random[1] * (random[2] < 0.6) / radius
    # gratings on a third: period 4 to 48 canvas pixels, at least two periods to a shape
    period = torch.minimum(4 * (math.log(12) * random[3]).exp(), radius.clamp_min(4))
    waves = (0.04 + 0.3 * random[4] ** 2) * (random[5] < 0.3) * (radius > 6)
    noise = (0.01 + 0.16 * random[6] ** 2) * (random[7] < 0.75)
    field = (random[8] * _FIELDS).long()
    slope_x, slope_y = turn.cos(), turn.sin()
    columns = [shade * slope_x, shade * slope_y, -shade * (slope_x * centre_x + slope_y * centre_y),
               slope_y / period, -slope_x / period, waves, noise, field.float()]  # fmt: skip

    def at(values: Tensor) -> Tensor:
        return values.gather(1, shape_of_pixel).unflatten(1, (canvas, canvas))

    ramp_x, ramp_y, ramp, wave_x, wave_y, waves, noise, field = map(at, columns)
    fields = _noise_fields(draws, canvas)
    axis, side = torch.arange(canvas, device=colour.device), fields.shape[-1]
    x, y = axis + 0.5, axis[:, None] + 0.5
    tile = (axis[:, None] % side) * side + axis % side
    grain = fields.flatten(1).gather(1, (field.long() * side**2 + tile).flatten(1)).unflatten(1, (canvas, canvas))
    texture = noise * grain + waves * torch.sin(2 * math.pi * (wave_x * x + wave_y * y))
    light = ramp_x * x + ramp_y * y + ramp
    image = torch.stack([at(channel) for channel in colour.unbind(1)], dim=1)
    image = image + (light + texture * (0.35 + 0.65 * image.mean(1)))[:, None]
    slope = 0.5 * (style[:, 6:8] - 0.5)[..., None, None]
    return (image * (1 + slope[:, :1] * (x / canvas - 0.5) + slope[:, 1:] * (y / canvas - 0.5))).clamp_(0, 1)
