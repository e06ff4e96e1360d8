"""Tiles cover an image without gaps or seams, and finished rows have the colours of the input."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from morsr.functional.resample import bicubic_window
from morsr.restoring.tiles import tiling


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, int], int, int]:
    """Size of an image, side of a tile, and the networks' grid."""
    size = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    return size, draw(st.integers(max(size) // 6 + 1, 90)), draw(st.sampled_from([1, 4, 16]))


@given(tilings())
def test_tiling_the_identity_is_the_identity(case):
    size, side, multiple = case
    images, canvas = torch.rand(2, 3, *size), torch.zeros(2, 3, *size)
    plan = tiling(size, side, multiple)
    for window in plan.windows:
        place = {"top": window.top, "left": window.left, "height": window.height, "width": window.width}
        assert not any(value % multiple for value in place.values())
        assert max(window.height, window.width) <= plan.side <= max(side + multiple - 1, 2 * multiple)
        window.add(canvas, bicubic_window(images, size, **place))
    assert_close(canvas, images, atol=1e-6, rtol=0)


def test_one_tile_hands_over_to_the_next_without_a_step():
    """Two tiles of constants 0 and 1: the ramp between them rises slowly and ends level with its tiles."""
    plan, canvas = tiling((64, 112), 64, 16), torch.zeros(1, 1, 64, 112)
    assert len(plan.windows) == 2
    for value, window in enumerate(plan.windows):
        window.add(canvas, torch.full((1, 1, 64, 64), float(value)))
    ramp = canvas[0, 0, 32]
    assert_close(ramp[[0, 47, 64, 111]], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert (ramp.diff() >= -1e-6).all()
    assert ramp.diff().max() < 0.25
    assert ramp[48] < 0.01 < 0.99 < ramp[63]
