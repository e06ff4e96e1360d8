"""What a checkpoint or a file of adapters holds, and what it has to agree with."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from morsr.adapters import MoRConfig
from morsr.adapters.files import check_base
from morsr.errors import WeightsError
from morsr.models.generator import OneStepGenerator

_GO_ON = (
    "; continue with the config that made it, or start a new run from its adapters file (*.safetensors) with "
    "model.start_from"
)
# Where an estimator's weights are read from, not what they are.
_NO_RESULT = ("text_cache", "local_files_only")


def saved_tensors(module: nn.Module, trained: Iterable[Tensor], generator: OneStepGenerator) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: the trained tensors, the router's statistics, and modules_to_save.

    The trained tensors are told apart by identity: which of them take a gradient changes within a step.
    """
    inside = {id(parameter) for parameter in trained}
    if generator.adapters is not None:
        router = generator.adapters.router
        inside |= {id(tensor) for tensor in (*router.parameters(), *router.buffers())}
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) in inside}


def check_settings(described: Mapping[str, Any], generator: OneStepGenerator) -> None:
    """Refuse a checkpoint that was trained on another base, or with other settings of what the adapters compute.

    Args:
        described: what the checkpoint says of itself, its "morsr".
        generator: that continues from it.
    """
    try:
        check_base("the checkpoint", described, generator.base)
    except WeightsError as error:
        raise WeightsError(f"{error}{_GO_ON}") from error
    other = runs_otherwise(described.get("extra", {}), generator)
    if "adapters" in described and generator.adapters is not None:
        theirs = MoRConfig.from_dict(described["adapters"]).computing()
        other = _differences("adapters", theirs, generator.adapters.config.computing()) or other
    if other:
        raise WeightsError(f"the checkpoint was trained to run with {other}{_GO_ON}")


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of other networks: tensors by other names, or of other shapes."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (wanted, found)]
    if odd := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        expected, got = (side.get(odd[0], "none") for side in shapes)
        raise WeightsError(
            f"the checkpoint does not fit the configured adapters and losses: {len(odd)} tensors differ, such as "
            f"{odd[0]}, {got} there and {expected} here{_GO_ON}"
        )


def check_optimizers(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Name optimizer settings that a resumed run does not take, since the optimizers' states hold the old ones.

    Warm-up and schedule are no part of those states: a resumed run follows what its config says.

    Raises:
        WeightsError: an optimizer or a schedule of another class, which cannot take such a state.
    """
    changed = {
        name: f"{name} {stored[name]} -> {value}"
        for name, value in now.items()
        if name not in ("warmup", "schedule") and name in stored and _plain(stored[name]) != _plain(value)
    }
    if other := [text for name, text in changed.items() if name.startswith(("optimizers.", "schedulers."))]:
        raise WeightsError(f"the checkpoint holds the states of other optimizers: {other[0]}{_GO_ON}")
    if changed:
        rank_zero_warn(
            "the optimizers keep the settings of the checkpoint, so this has no effect: "
            f"{', '.join(changed.values())}; to change it, start a new run from an adapters file with model.start_from"
        )


def runs_otherwise(extra: Mapping[str, Any], generator: OneStepGenerator) -> str:
    """What adapters were trained to run with, where it is not what a generator runs them with; else empty.

    Args:
        extra: of the adapters' header.
        generator: whose UNet call, router and estimator are compared.
    """
    if extra.get("decoder"):
        return "a decoder apart from its base's, which only morsr 0.1 has"
    theirs, spec, estimator = extra.get("one_step") or {}, extra.get("estimator"), generator.estimator
    mine = generator.one_step.to_dict()
    if other := _differences("one_step", theirs, mine, besides=["scale", *(k for k in mine if mine[k] == "auto")]):
        return other
    router = generator.adapters.router.class_path if generator.adapters is not None else None
    if extra.get("router") not in (None, router):
        return f"the router {extra['router']!r}"
    if not isinstance(spec, Mapping) or estimator is None:
        return ""
    kind = estimator.spec["kind"]
    if spec.get("kind") != kind:
        return f"the estimator {spec.get('kind')!r}, not {kind!r}"
    parameters = inspect.signature(type(estimator)).parameters
    usual = {key: one.default for key, one in parameters.items() if one.default is not one.empty}
    there, here = ({**usual, **(args or {})} for args in (spec.get("args"), estimator.spec["args"]))
    # Weights are told apart by their digest where both sides have one, else by their name.
    weights = "model" if there.get("digest") and here.get("digest") else "digest"
    return _differences(f"the estimator {kind!r}", there, here, besides=(*_NO_RESULT, weights))


def _differences(name: str, theirs: Mapping[str, Any], mine: Mapping[str, Any], besides: Iterable[str] = ()) -> str:
    """Settings of theirs that are others here, as "one_step with timestep 150, not 400"."""
    pairs = {key: (_plain(value), _plain(mine.get(key))) for key, value in theirs.items() if key not in besides}
    changed = [f"{key} {there!r}, not {here!r}" for key, (there, here) in pairs.items() if there != here]
    return f"{name} with {', '.join(changed)}" if changed else ""


def _plain(value: Any) -> Any:
    """As a file gives it back: lists for tuples, and paths as text."""
    return json.loads(json.dumps(value, default=os.fspath))
