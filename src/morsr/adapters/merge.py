"""Merge the ranks of one routing into the weights, for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from morsr.adapters.inject import adapted_layers, report_of, switch_of
from morsr.adapters.layer import AdaptedLayer
from morsr.errors import ConfigError


@contextmanager
def merged(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Merge one image's ranks into the weights of a model or of a part of one; it then costs what the bare one costs.

    Updates are added in float32 and rounded once to the weights' dtype. On exit the original weights are back
    bit-identical. While open, one more copy of the adapted layers' weights is held, and the routing cannot change.

    Args:
        model: an adapted model in evaluation mode, or a part such as its UNet.
        name: a set; the active one by default.

    Raises:
        ConfigError: no set is active, another merge is open, or the set is in training mode.
        InputError: no routing, or one of several images.
    """
    switch = switch_of(model)
    name = name or (switch.active if switch else None)
    if name is None:
        raise ConfigError("no adapter set is active; name the one to merge")
    report_of(model, name)  # or its error
    with merged_layers([layer for _, layer in adapted_layers(model) if name in layer.sets], name):
        yield


@contextmanager
def merged_layers(layers: Sequence[AdaptedLayer], name: str) -> Iterator[None]:
    """`merged` for some layers that carry a set."""
    if layers and layers[0].switch.reports[name].router.training:
        raise ConfigError("merged weights pass no gradient to the ranks; call model.eval() first")
    if any(layer.merged is not None for layer in layers):
        raise ConfigError("these weights are merged already; leave that block first")
    weights = [layer.torch_layer(name).weight for layer in layers]
    originals = [weight.data for weight in weights]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            weight.data = layer.merged_weight(name)
            layer.merged = name
        yield
    finally:
        for layer, weight, original in zip(layers, weights, originals, strict=True):
            weight.data, layer.merged = original, None
