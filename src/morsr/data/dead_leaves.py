"""Dead leaves: endless synthetic photographs, rendered on the device.

Random opaque shapes with power-law radii (density r^-3, so that every octave of sizes covers the same area) hide one
another in a random depth order. That alone gives images the edge statistics and the 1/f spectrum of photographs; each
shape also gets a colour of the image's palette, soft shading, and a texture (1/f noise, grating, checks or bricks).

How it is fast: shapes are drawn in layers. A layer is a grid of cells with one shape inside each, so it is evaluated as
one dense image without scatter; the depth buffer keeps, per subpixel, the largest (depth, shape) number of all layers.
Everything random is a hash of (key, counter): an image depends on its key alone, not on batch mates or the device.

Dimensions: B images, N shapes, G cells a side, W cell side, C canvas side (2 x size).

Source: Lee, Mumford, Huang, "Occlusion models for natural images" (IJCV 2001); networks trained on such images come
close to those trained on photographs (Achddou, Gousseau, Ladjal, "Synthetic images as a regularity prior", 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.degradation.keys import mix
from morsr.errors import InputError

_SUPERSAMPLE = 2
_SMALLEST_RADIUS = 2.5  # of the finest shapes, in canvas pixels
_LARGEST_RADIUS = 0.8  # of the coarsest shapes, in canvas sides
_LAYERS_PER_OCTAVE = 4
_CELL = 2.4  # cell side over the largest radius in it: room for the shape to move
_ARCS = 4  # thin lines per image, arcs of large circles
_FIELDS = 4  # 1/f noise fields per image
# Rendered at once: on a CPU what stays in its cache; an accelerator wants few, large launches.
_SUBPIXELS_CPU, _SUBPIXELS = 2**18, 2**24
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number


class _Draws:
    """Uniform numbers in [0, 1) per image; each call takes the next counters of every image's own stream."""

    def __init__(self, keys: Tensor) -> None:
        self.base_B1 = mix(keys + _GOLDEN)[:, None]
        self.used = 0

    def __call__(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        counters = torch.arange(self.used, self.used + count, device=self.base_B1.device)
        self.used += count
        bits = mix(self.base_B1 + (counters + 1) * _GOLDEN)
        uniform = ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
        return uniform.reshape(-1, *shape)


def dead_leaves(
    batch: int,
    size: int,
    *,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Render a batch of dead-leaves images.

    Args:
        batch: number of images B.
        size: height and width in pixels, at least 16.
        generator: CPU generator that draws the keys where none are given; None uses PyTorch's global one.
        keys: int64 (B,), one per image; equal keys give equal images of one size.
        device: where to render.

    Returns:
        float32 (B, 3, size, size) in [0, 1] on the device.

    Raises:
        InputError: a size under 16, an empty batch, or keys that are not int64 (B,).
    """
    if batch < 1 or size < 16:
        raise InputError(f"dead_leaves: expected at least one image of at least 16 pixels, got {batch} of {size}")
    if keys is None:
        keys = torch.randint(2**62, (batch,), generator=generator)
    if keys.shape != (batch,) or keys.dtype != torch.int64:
        raise InputError(f"dead_leaves: expected int64 keys of shape ({batch},), got {keys.dtype} {tuple(keys.shape)}")
    keys = keys.to(device)
    subpixels = _SUBPIXELS_CPU if keys.device.type == "cpu" else _SUBPIXELS
    chunk = max(1, subpixels // (_SUPERSAMPLE * size) ** 2)
    with torch.no_grad():
        return torch.cat([_render(part, size) for part in keys.split(chunk)])


def _render(keys: Tensor, size: int) -> Tensor:
    canvas = _SUPERSAMPLE * size
    draws = _Draws(keys)
    style = draws(16)
    layers = _layer_radii(canvas)
    grids = [math.ceil(canvas / _cell_side(radius)) + 1 for radius in layers]
    shapes = 1 + _ARCS + sum(grid * grid for grid in grids)
    id_bits = (shapes - 1).bit_length()
    dtype = torch.int32 if id_bits <= 18 else torch.int64
    depth_levels = 2 ** (31 - id_bits) if dtype == torch.int32 else 2**30

    # The finest shapes of an image are between the finest possible and an eighth of the canvas, most often fine.
    smallest = _SMALLEST_RADIUS * (canvas / 8 / _SMALLEST_RADIUS) ** (style[:, 0:1] ** 1.3)
    present = 0.35 + 0.65 * style[:, 1:2]
    top = torch.zeros(len(keys), canvas, canvas, dtype=dtype, device=keys.device)
    first = 1 + _ARCS
    geometry = [torch.zeros(len(keys), 3, first, device=keys.device)]  # centre x, y and radius of every shape
    geometry[0][:, :2] = canvas / 2
    geometry[0][:, 2] = canvas
    for number, (radius, grid) in enumerate(zip(layers, grids, strict=True)):
        random = draws(16, grid * grid)
        # power law r^-3 within the layer's half octave, by its inverse cumulative distribution
        radius_BN = radius * (1 + random[:, 0]).rsqrt()
        shown = (radius_BN >= smallest) & (random[:, 1] < present)
        # most images have no shapes as fine as the finest layers; asking costs an accelerator a pause, a CPU nothing
        if keys.device.type == "cpu" and not shown.any():
            geometry.append(torch.ones(len(keys), 3, grid * grid, device=keys.device))
            first += grid * grid
            continue
        depth = torch.where(shown, (random[:, 2] * (depth_levels - 2)).long() + 1, torch.zeros_like(keys)[:, None])
        ids = first + torch.arange(grid * grid, device=keys.device)
        rank = ((depth << id_bits) + ids).mul(depth > 0).to(dtype)
        centres = _draw_layer(top, rank, radius_BN, random, cell=_cell_side(radius), grid=grid, number=number)
        geometry.append(torch.stack([*centres, radius_BN], dim=1))
        first += grid * grid
    arc_depth = ((draws(_ARCS) * 0.4 + 0.6) * (depth_levels - 2)).long() + 1
    _draw_arcs(top, ((arc_depth << id_bits) + torch.arange(1, 1 + _ARCS, device=keys.device)).to(dtype), draws)
    shape_of_pixel = (top & (2**id_bits - 1)).long().flatten(1)
    image = _paint(shape_of_pixel, torch.cat(geometry, dim=2), style, draws, canvas)
    return F.avg_pool2d(image, _SUPERSAMPLE).clamp(0, 1)


def _layer_radii(canvas: int) -> list[float]:
    """Largest radius of each layer, evenly spaced in octaves."""
    largest = _LARGEST_RADIUS * canvas
    count = round(_LAYERS_PER_OCTAVE * math.log2(largest / (1.4 * _SMALLEST_RADIUS)))
    return [largest * 2 ** (-index / _LAYERS_PER_OCTAVE) for index in range(count)]


def _cell_side(radius: float) -> int:
    return max(4, round(_CELL * radius))


def _draw_layer(
    top: Tensor, rank: Tensor, radius: Tensor, random: Tensor, *, cell: int, grid: int, number: int
) -> tuple[Tensor, Tensor]:
    """Draw one shape per cell into the depth buffer `top` (B, C, C), in place; return the centres x, y (B, N)."""
    canvas = top.shape[-1]
    # a fixed low-discrepancy offset per layer keeps the cells of different layers from lining up
    offset_x, offset_y = (int(cell * ((number + 1) * step % 1.0)) for step in (0.7548776662, 0.5698402910))
    room = (cell / 2 - radius).clamp_min(0)
    centre_x = cell / 2 + (2 * random[:, 3] - 1) * room  # within the cell
    centre_y = cell / 2 + (2 * random[:, 4] - 1) * room
    angle = 2 * math.pi * random[:, 5]
    within = torch.arange(cell, device=top.device, dtype=torch.float32) + 0.5
    visible = slice(offset_x, offset_x + canvas)

    def draw(cells: slice, inner: slice) -> Tensor:
        """The inner rows of some rows of cells, (B, rows, C): painted subpixels hold their shape's rank."""

        def columns(values: Tensor) -> Tensor:  # (B, N) -> (B, G, 1, C): a row of pixels through each row of cells
            rows_of_cells = values.unflatten(1, (grid, grid))[:, cells]
            return rows_of_cells.repeat_interleave(cell, dim=2)[:, :, None, visible]

        local_x = within.repeat(grid)[visible] - columns(centre_x)
        column_y = columns(centre_y)
        rows = within[inner, None]

        def plane(slope_x: Tensor, slope_y: Tensor, constant: Tensor | None = None) -> Tensor:
            """slope_x * x + slope_y * y - constant around each centre, (B, G, rows of a cell, C)."""
            wide_y = columns(slope_y)
            start = local_x * columns(slope_x) - column_y * wide_y
            return torch.addcmul(start if constant is None else start - columns(constant), wide_y, rows)

        level = _KINDS[number % len(_KINDS)](plane, radius, angle, random)
        return _where_negative(level, columns(rank)).flatten(1, 2)

    if grid > 6:
        painted = draw(slice(None), slice(None))[:, offset_y : offset_y + canvas]
        torch.maximum(top, painted, out=top)
    else:  # large cells reach far beyond the canvas: draw what is visible of each row of cells
        for row in range(grid):
            start = row * cell - offset_y
            inner = slice(max(0, -start), min(cell, canvas - start))
            if inner.stop > inner.start:
                part = top[:, start + inner.start : start + inner.stop]
                torch.maximum(part, draw(slice(row, row + 1), inner), out=part)
    index = torch.arange(grid * grid, device=top.device)
    return centre_x + (index % grid) * cell - offset_x, centre_y + (index // grid) * cell - offset_y


def _where_negative(level: Tensor, values: Tensor) -> Tensor:
    """Integer `values` where the float32 `level` is negative, else 0; by the sign bit, many times faster than where."""
    mask = level.view(torch.int32) >> 31
    return mask.bitwise_and_(values) if values.dtype == torch.int32 else mask.to(values.dtype) & values


_Plane = Callable[..., Tensor]


def _ellipse(plane: _Plane, radius: Tensor, angle: Tensor, random: Tensor) -> Tensor:
    cos, sin = angle.cos() / radius, angle.sin() / radius
    narrow = torch.where(random[:, 6] < 0.3, torch.ones_like(radius), 1 / (0.25 + 0.75 * random[:, 7]))
    long = plane(cos, sin)
    short = plane(-sin * narrow, cos * narrow)
    return torch.addcmul(long.square_(), short, short).sub_(1)


def _blob(plane: _Plane, radius: Tensor, angle: Tensor, random: Tensor) -> Tensor:
    """A disk bent by a cubic term into a soft, three-cornered leaf."""
    cos, sin = 1.3 * angle.cos() / radius, 1.3 * angle.sin() / radius
    long = plane(cos, sin)
    short = plane(-sin, cos)
    long_2, short_2 = long.square(), short.square_()
    bend = torch.addcmul(long_2, short_2, torch.full((), -3.0, device=long.device)).mul_(long)
    return long_2.add_(short_2).add_(bend, alpha=0.38).sub_(0.8)


def _polygon(corners: int, jitter: float, nearest: float, farthest: float) -> Callable[..., Tensor]:
    def draw(plane: _Plane, radius: Tensor, angle: Tensor, random: Tensor) -> Tensor:
        worst = None
        for corner in range(corners):
            turned = angle + (2 * math.pi / corners) * (corner + jitter * (random[:, 6 + corner] - 0.5))
            reach = nearest + (farthest - nearest) * random[:, 11 + corner]
            side = plane(turned.cos() / radius, turned.sin() / radius, reach)
            worst = side if worst is None else torch.maximum(worst, side, out=worst)
        assert worst is not None
        return worst

    return draw


_KINDS = (
    _ellipse,
    _polygon(4, 0.0, 0.2, 0.7),  # rectangles
    _blob,
    _polygon(3, 0.15, 0.25, 0.36),
    _ellipse,
    _polygon(4, 0.5, 0.25, 0.5),
    _polygon(5, 0.4, 0.4, 0.65),
)


def _draw_arcs(top: Tensor, rank: Tensor, draws: _Draws) -> None:
    canvas = top.shape[-1]
    axis = torch.arange(canvas, device=top.device, dtype=torch.float32) + 0.5
    for line in range(rank.shape[1]):
        through_x, through_y, turn, bow, width, shown = draws(6).unbind(1)
        radius = canvas * (0.3 + 8 * bow**3)
        centre_x = canvas * through_x + radius * (2 * math.pi * turn).cos()
        centre_y = canvas * through_y + radius * (2 * math.pi * turn).sin()
        squares_x = (axis - centre_x[:, None]).square()[:, None]
        squares_y = (axis - centre_y[:, None]).square()[:, :, None]
        distance = (squares_x + squares_y).sqrt_().sub_(radius[:, None, None]).abs_()
        half = (0.6 + 3.0 * width**2) * (shown < 0.5)
        distance.sub_(half[:, None, None])
        torch.maximum(top, _where_negative(distance, rank[:, line, None, None]), out=top)


def _noise_fields(draws: _Draws, style: Tensor, canvas: int) -> Tensor:
    """Tileable noise (B, fields, S, S) of zero mean and unit deviation with spectra 1/f^a, from rough to smooth."""
    side = min(256, 2 ** (canvas - 1).bit_length())
    white = draws(_FIELDS, side, side) - 0.5
    axis_y = torch.fft.fftfreq(side, device=white.device)
    axis_x = torch.fft.rfftfreq(side, device=white.device)
    frequency = (axis_y[:, None].square() + axis_x.square()).sqrt()
    frequency[0, 0] = 1.0
    start = torch.linspace(0.5, 1.5, _FIELDS, device=white.device)
    exponents = start + 0.3 * style[:, 4:5]
    gain = (-exponents[:, :, None, None] * frequency.log()).exp()
    gain[..., 0, 0] = 0
    fields = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=(side, side))
    return fields / fields.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-6)


def _palette(draws: _Draws, style: Tensor, shapes: int) -> tuple[Tensor, Tensor]:
    """Base colours and the directions textures move them in, (B, N, 3) each: strong in lightness, weak in hue."""
    entries = 12
    random = draws(3, entries)
    saturation = 0.3 + 1.4 * style[:, 5:6]
    warm = (random[:, 1] - 0.5 + 0.3 * (style[:, 6:7] - 0.5)) * saturation * 0.5
    green = (random[:, 2] - 0.5 + 0.3 * (style[:, 7:8] - 0.5)) * saturation * 0.25
    pick, jitter = (draws(shapes) * entries).long(), draws(4, shapes)
    light = random[:, 0].gather(1, pick) + 0.35 * (jitter[:, 0] - 0.5)
    light = light.clamp(0.01, 0.99) ** (0.7 + 1.1 * style[:, 8:9])
    chroma = (light * (1 - light) * 4).clamp(0.25, 1) * (0.6 + 0.8 * jitter[:, 1])
    warm = warm.gather(1, pick) * chroma
    green = green.gather(1, pick) * chroma + 0.03 * (jitter[:, 2] - 0.5)
    colour = torch.stack([light + warm, light + green, light - warm], dim=2)
    hue = 0.5 * (jitter[:, 3] - 0.5)
    tint = (0.35 + 0.65 * light)[..., None] * torch.stack([1 + hue, torch.ones_like(hue), 1 - hue], dim=2)
    return colour, tint


def _paint(shape_of_pixel: Tensor, geometry: Tensor, style: Tensor, draws: _Draws, canvas: int) -> Tensor:
    """Colour every subpixel by its shape: (B, C * C) shape numbers -> image (B, 3, C, C)."""
    shapes = geometry.shape[2]
    centre_x, centre_y, radius = geometry.unbind(1)
    colour, tint = _palette(draws, style, shapes)
    random = draws(12, shapes).unbind(1)
    turn = 2 * math.pi * random[0]
    shade = torch.where(random[1] < 0.6, 0.35 * random[2], torch.zeros_like(turn)) / radius
    shade_x, shade_y = shade * turn.cos(), shade * turn.sin()
    shade_0 = -(shade_x * centre_x + shade_y * centre_y)
    # period of the regular textures, 4 to 48 canvas pixels, but at least two periods to a shape
    period = torch.minimum(4 * (math.log(12) * random[3]).exp(), radius.clamp_min(4))
    lattice_x = (2 * math.pi * random[4]).cos() / period
    lattice_y = (2 * math.pi * random[4]).sin() / period
    kind = random[5]
    regular = (kind < 0.3) & (radius > 6)
    lattice_amount = torch.where(regular, 0.04 + 0.3 * random[6] ** 2, torch.zeros_like(kind))
    noise_amount = torch.where(random[7] < 0.75, 0.01 + 0.16 * random[8] ** 2, torch.zeros_like(kind))
    field = (random[9] * _FIELDS).long()
    fields = _noise_fields(draws, style, canvas)
    side = fields.shape[-1]
    shift = (random[10] * side * side).floor()
    sharpness = 1 + 7 * random[11]
    columns = [*colour.unbind(2), *tint.unbind(2), shade_x, shade_y, shade_0, lattice_x, lattice_y, random[8]]
    columns += [lattice_amount, noise_amount, field.float(), shift, sharpness, kind / 0.3]
    values = tuple(column.gather(1, shape_of_pixel).unflatten(1, (canvas, canvas)) for column in columns)
    axis = torch.arange(canvas, device=colour.device)
    x, y = axis.float() + 0.5, axis.float()[:, None] + 0.5

    shift_pixel = values[15].long()
    across = (axis + shift_pixel % side) & (side - 1)
    down = (axis[:, None] + shift_pixel // side) & (side - 1)
    index = (values[14].long() * side + down) * side + across
    noise = fields.flatten(1).gather(1, index.flatten(1)).unflatten(1, (canvas, canvas))
    texture = noise * values[13] + values[12] * _lattice(values, x, y)
    light = values[6] * x + values[7] * y + values[8]
    image = torch.stack([values[c] + values[3 + c] * texture + light for c in range(3)], dim=1)
    slope = 0.5 * (style[:, 9:11] - 0.5)[..., None, None]
    return (image * (1 + slope[:, :1] * (x / canvas - 0.5) + slope[:, 1:] * (y / canvas - 0.5))).clamp_(0, 1)


def _lattice(values: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
    """Regular texture in [-1, 1]: kind < 1/3 a grating, < 2/3 checks, else bricks; sharpness squares waves."""
    kind, sharpness = values[17], values[16]
    along = values[9] * x + values[10] * y + values[11]
    across = values[9] * y - values[10] * x
    bricks = kind > 2 / 3
    along = along + bricks * (0.5 * (across.floor() % 2))
    wave_1 = torch.sin(2 * math.pi * along)
    wave_2 = torch.where(kind < 1 / 3, torch.ones_like(kind), torch.sin(2 * math.pi * across))
    joint = torch.maximum(torch.sin(math.pi * along).square(), torch.sin(math.pi * across).square()).square()
    joints = 1 - 2 * joint * joint * joint
    return torch.where(bricks, joints, torch.tanh(sharpness * wave_1 * wave_2))
