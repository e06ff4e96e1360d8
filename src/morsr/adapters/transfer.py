"""Start an adapter set from the file of a smaller one: a plain LoRA, or a mixture with fewer shared ranks."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import nn

from morsr.adapters.checkpoint import (
    check_layers,
    check_scores,
    comparable_settings,
    load_adapters,
    read_adapters_header,
    read_tensors,
)
from morsr.adapters.config import MoRConfig
from morsr.adapters.inject import layers_of_set, routing_context
from morsr.adapters.same_base import check_base_id, check_print
from morsr.adapters.whole import whole_parameters
from morsr.errors import WeightsError


def start_from_adapters(
    path: str | os.PathLike[str], model: nn.Module, *, name: str = "generator", base_id: str = ""
) -> str:
    """Give a set on a model the values of an adapters file, of its own configuration or of a smaller set.

    The ranks of a plain LoRA, which work for every image, take the place of as many shared ranks; so do the shared
    ranks of a mixture that has fewer of them and is the same otherwise, whose routed ranks and router come along. All
    other ranks keep their fresh values, whose update is zero: the set then computes what the smaller one computed.
    Parameters of the base that the file holds whole take the place of the model's own.

    Args:
        path: adapters file.
        model: carries the set already.
        name: of the set.
        base_id: what the base model is called; under another id than the file's, the weights decide, with a warning.

    Returns:
        One line that says what was done.

    Raises:
        WeightsError: another base; layers or shapes that the set does not have; a routed file of another configuration,
            of other scores or with more shared ranks; or a LoRA of more ranks than the set shares. Nothing is changed
            then.
    """
    header = read_adapters_header(path)
    context = routing_context(model, name)
    theirs, mine = MoRConfig.from_dict(header["config"]), context.config
    if not _grows(theirs, mine, header["condition_dim"], context.condition_dim) and (
        theirs.is_routed or comparable_settings(theirs) == comparable_settings(mine)
    ):
        load_adapters(path, model, name=name, base_id=base_id, by_weights=True)
        return f"start from {path}: all of it"
    shared = theirs.num_shared if theirs.is_routed else theirs.num_ranks
    if shared > mine.num_shared:
        raise WeightsError(
            f"{path}: a LoRA of {shared} ranks; they become shared ranks, of which the configuration has "
            f"{mine.num_shared}: set adapters.num_shared to at least {shared}"
        )
    if mine.scale == 0:
        raise WeightsError(f"{path}: adapters.scale is 0, with which no ranks have any effect")
    check_base_id(path, header, model, base_id, by_weights=True)
    tensors = read_tensors(path, header)
    here = {layer_name: (layer, own) for layer_name, layer, own in layers_of_set(model, name)}
    for layer in header["layers"]:
        if layer["name"] not in here:
            raise WeightsError(f"{path}: adapts {layer['name']}, which adapters.targets leave out")
        shape = list(here[layer["name"]][0].weight.shape)
        if shape != list(layer["shape"]):
            raise WeightsError(f"{path}: {layer['name']} has shape {layer['shape']} there, {shape} here")
        check_print(path, layer["name"], here[layer["name"]][0].weight, layer["print"])
    if theirs.is_routed:  # its router goes with all of its layers, so they must be all of those here
        check_layers(path, header, [(layer_name, layer.weight) for layer_name, (layer, _) in here.items()], False)
        check_scores(path, header, context)
    whole = whole_parameters(model, header.get("whole", {}), path=path)
    with torch.no_grad():
        for key, parameter in whole.items():
            parameter.copy_(tensors[f"whole.{key}"])
        context.whole = tuple(whole)
        for layer in header["layers"]:
            own = here[layer["name"]][1]
            for side, factor in (("down", 1.0), ("up", theirs.scale / mine.scale)):
                values, target = tensors[f"layers.{layer['name']}.{side}"] * factor, getattr(own, side)
                target[:shared].copy_(values[:shared])
                if theirs.is_routed:
                    target[mine.num_shared :].copy_(values[shared:])
        if theirs.is_routed:
            for key, value in context.state_dict().items():
                value.copy_(tensors[f"context.{key}"])
            context.condition = None  # the routing there is was the old router's
            return f"start from {path}: its {shared} shared ranks as the first of {mine.num_shared}, the rest as it is"
    return f"start from {Path(path).name}: its {shared} ranks as shared ranks of {len(header['layers'])} layers"


def _grows(theirs: MoRConfig, mine: MoRConfig, their_dim: int, my_dim: int) -> bool:
    """Whether a mixture is another one with more shared ranks and nothing else."""
    more = mine.num_shared - theirs.num_shared
    if more <= 0 or not theirs.is_routed or their_dim != my_dim:
        return False
    grown = dataclasses.replace(theirs, num_ranks=theirs.num_ranks + more, num_shared=mine.num_shared)
    return comparable_settings(grown) == comparable_settings(mine)
