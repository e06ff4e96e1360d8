"""Start an adapter set from the file of a smaller one: a plain LoRA becomes the first shared ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from morsr.adapters.checkpoint import load_adapters, read_adapters_header, read_tensors
from morsr.adapters.config import MoRConfig
from morsr.adapters.inject import layers_of_set, routing_context
from morsr.errors import WeightsError


def start_from_adapters(
    path: str | os.PathLike[str], model: nn.Module, *, name: str = "generator", base_id: str = ""
) -> str:
    """Give a set on a model the values of an adapters file, of its own configuration or of a plain LoRA.

    The ranks of a plain LoRA, which work for every image, take the place of as many shared ranks. All other ranks keep
    their fresh values, whose update is zero: the set then computes what the LoRA computed.

    Args:
        path: adapters file.
        model: carries the set already.
        name: of the set.
        base_id: what the base model is called.

    Returns:
        One line that says what was done.

    Raises:
        WeightsError: another base; layers or shapes that the set does not have; a routed file of another configuration;
            or a LoRA of more ranks than the set shares. Nothing is changed then.
    """
    header = read_adapters_header(path)
    theirs, mine = MoRConfig.from_dict(header["config"]), routing_context(model, name).config
    if theirs.is_routed or (not mine.is_routed and theirs.num_ranks == mine.num_ranks):
        load_adapters(path, model, name=name, base_id=base_id)
        return f"start from {path}: all of it"
    ranks = theirs.num_ranks
    if ranks > mine.num_shared:
        raise WeightsError(
            f"{path}: a LoRA of {ranks} ranks; they become shared ranks, of which the configuration has "
            f"{mine.num_shared}: set adapters.num_shared to at least {ranks}"
        )
    if mine.scale == 0:
        raise WeightsError(f"{path}: adapters.scale is 0, with which no ranks have any effect")
    if base_id and header["base_id"] and base_id != header["base_id"]:
        raise WeightsError(f"{path}: made for the base {header['base_id']!r}, not for {base_id!r}")
    tensors = read_tensors(path, header)
    here = {layer_name: (layer, own) for layer_name, layer, own in layers_of_set(model, name)}
    for layer in header["layers"]:
        if layer["name"] not in here:
            raise WeightsError(f"{path}: adapts {layer['name']}, which adapters.targets leave out")
        shape = list(here[layer["name"]][0].weight.shape)
        if shape != list(layer["shape"]):
            raise WeightsError(f"{path}: {layer['name']} has shape {layer['shape']} there, {shape} here")
    with torch.no_grad():
        for layer in header["layers"]:
            own = here[layer["name"]][1]
            own.down[:ranks].copy_(tensors[f"layers.{layer['name']}.down"])
            own.up[:ranks].copy_(tensors[f"layers.{layer['name']}.up"] * (theirs.scale / mine.scale))
    return f"start from {Path(path).name}: its {ranks} ranks as shared ranks of {len(header['layers'])} layers"
