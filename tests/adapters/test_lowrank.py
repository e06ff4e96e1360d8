from __future__ import annotations

import pytest
import torch
from torch import nn

from morsr.functional.lowrank import ConvGeometry, add_lowrank_conv2d, add_lowrank_linear, add_lowrank_weight

CONVS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "1x1 stride 2": {"kernel_size": 1, "stride": 2},
    "3x3 stride 2 unpadded": {"kernel_size": 3, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": (2, 1), "dilation": (2, 1)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "grouped 1x1": {"kernel_size": 1, "groups": 4},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


def layer_and_geometry(kind):
    layer = nn.Conv2d(4, 8, **CONVS[kind], dtype=torch.float64)
    padding = layer.padding
    geometry = ConvGeometry(
        layer.stride, padding, layer.dilation, layer.groups, layer.padding_mode, layer._reversed_padding_repeated_twice
    )
    return layer, geometry


def merged_output(layer, inputs, down, up):
    twin = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        padding_mode=layer.padding_mode,
        dtype=inputs.dtype,
    )
    twin.weight.data, twin.bias.data = add_lowrank_weight(layer.weight, down, up), layer.bias
    return twin(inputs)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_image", ["none", "up", "both"])
@pytest.mark.parametrize("kind", CONVS)
def test_convolution_equals_its_merged_weight(kind, per_image, memory_format):
    torch.manual_seed(0)
    layer, geometry = layer_and_geometry(kind)
    batch, ranks = 2, 3
    inputs = torch.randn(batch, 4, 7, 6, dtype=torch.float64).to(memory_format=memory_format)
    downs = torch.randn(batch, ranks, *layer.weight.shape[1:], dtype=torch.float64)
    ups = torch.randn(batch, ranks, 8, dtype=torch.float64)
    down = downs if per_image == "both" else downs[0]
    up = ups if per_image != "none" else ups[0]
    result = add_lowrank_conv2d(layer(inputs), inputs, down, up, geometry)
    expected = torch.cat(
        [
            merged_output(
                layer,
                inputs[image : image + 1],
                down if down.ndim == 4 else down[image],
                up if up.ndim == 2 else up[image],
            )
            for image in range(batch)
        ]
    )
    torch.testing.assert_close(result, expected)
    if memory_format is torch.channels_last and layer.groups == 1:
        assert result.is_contiguous(memory_format=torch.channels_last)
    single = add_lowrank_conv2d(layer(inputs[:1]), inputs[:1], downs[0], ups[0], geometry)
    torch.testing.assert_close(single, merged_output(layer, inputs[:1], downs[0], ups[0]))


@pytest.mark.parametrize("per_image", ["none", "up", "both"])
@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 5), (2, 2, 3, 5)])
def test_linear_equals_its_merged_weight(shape, per_image):
    torch.manual_seed(0)
    inputs, weight = torch.randn(shape, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    downs, ups = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    down = downs if per_image == "both" else downs[0]
    up = ups if per_image != "none" else ups[0]
    result = add_lowrank_linear(inputs @ weight.t(), inputs, down, up)
    for image in range(2):
        merged = add_lowrank_weight(
            weight, downs[image] if down.ndim == 3 else down, ups[image] if up.ndim == 3 else up
        )
        torch.testing.assert_close(result[image], inputs[image] @ merged.t())


def test_a_rank_is_an_outer_product():
    torch.manual_seed(0)
    weight, down, up = torch.randn(4, 2, 3, 3), torch.randn(3, 2, 3, 3), torch.randn(3, 4)
    expected = weight + torch.einsum("ro,rihw->oihw", up, down)
    torch.testing.assert_close(add_lowrank_weight(weight, down, up), expected)
    assert add_lowrank_weight(weight.half(), down, up).dtype == torch.float16
    last = add_lowrank_weight(weight.contiguous(memory_format=torch.channels_last), down, up)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected)
    for like in (weight, weight.contiguous(memory_format=torch.channels_last), weight.double(), weight.bfloat16()):
        out = torch.full_like(like, float("nan"))
        assert add_lowrank_weight(like, down, up, out=out).data_ptr() == out.data_ptr()
        assert torch.equal(out, add_lowrank_weight(like, down, up))


@pytest.mark.parametrize("kind", ["3x3 stride 2 unpadded", "grouped", "1x1"])
def test_gradients_of_convolution(kind):
    torch.manual_seed(0)
    layer, geometry = layer_and_geometry(kind)
    inputs = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    down = torch.randn(2, 2, *layer.weight.shape[1:], dtype=torch.float64, requires_grad=True)
    up = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, a, b: add_lowrank_conv2d(layer(x), x, a, b, geometry), (inputs, down, up), fast_mode=True
    )


def test_gradients_of_linear():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, dtype=torch.float64)
    arguments = [torch.randn(2, 5, 3), torch.randn(2, 2, 3), torch.randn(2, 2, 4)]
    arguments = [value.double().requires_grad_() for value in arguments]
    assert torch.autograd.gradcheck(lambda x, a, b: add_lowrank_linear(x @ weight.t(), x, a, b), arguments)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_image", ["none", "up", "both"])
@pytest.mark.parametrize("kind", ["3x3", "grouped"])
def test_update_in_place_gives_the_same_bits_without_a_copy(kind, per_image, memory_format):
    torch.manual_seed(0)
    layer, geometry = layer_and_geometry(kind)
    inputs = torch.randn(2, 4, 7, 6, dtype=torch.float64).to(memory_format=memory_format)
    down = torch.randn(2, 3, *layer.weight.shape[1:], dtype=torch.float64)
    up = torch.randn(2, 3, 8, dtype=torch.float64)
    down, up = down if per_image == "both" else down[0], up if per_image != "none" else up[0]
    with torch.no_grad():
        for images, rows in ((inputs, up), (inputs[:1], up[:1] if per_image != "none" else up)):
            kernels = down[: len(images)] if per_image == "both" else down
            output = layer(images)
            expected = add_lowrank_conv2d(output, images, kernels, rows, geometry)
            result = add_lowrank_conv2d(output, images, kernels, rows, geometry, in_place=True)
            assert torch.equal(result, expected)
            assert result.data_ptr() == output.data_ptr() or kind == "grouped"
        tokens, weight = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
        rows = torch.randn(2, 3, 4, dtype=torch.float64) if per_image == "both" else torch.randn(3, 4).double()
        output = tokens @ weight.t()
        expected = add_lowrank_linear(output, tokens, rows, up)
        assert torch.equal(add_lowrank_linear(output, tokens, rows, up, in_place=True), expected)
        assert torch.equal(output, expected)
