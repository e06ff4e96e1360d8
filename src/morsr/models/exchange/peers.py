"""Checkpoints of OSEDiff and PiSA-SR, read key by key into our adapters over the same base.

Both peers publish one torch file with the names of their LoRA's layers, its rank, and the tensors under peft's names,
`<layer>.lora_A.<adapter>.weight`. They were trained with peft's default alpha of 8, which the files do not say. What a
file holds and what it announces must be the same set of keys; nothing in it is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from morsr.adapters import MoRConfig, inject, layers_of_set, save_adapters, saved_modules
from morsr.adapters.inject import add_saved_modules
from morsr.errors import ConfigError, WeightsError
from morsr.estimators import build_estimator
from morsr.models.bases import Base, load_base, random_base
from morsr.models.generator import OneStepConfig

PEFT_DEFAULT_ALPHA = 8
"""lora_alpha of a LoraConfig that does not set it; the update's factor is alpha / rank, 2 at their rank of 4."""

ESTIMATOR: Mapping[str, Any] = {"kind": "frequency", "args": {}}
"""The imported models route nothing by degradation; scores are for the reports only, so the cheapest will do."""

_GROUPS = ("encoder", "decoder", "others")


@dataclass(frozen=True)
class PeerLora:
    """One LoRA of a peer's file.

    Attributes:
        rank: ranks per layer.
        down, up: by our layer names, (R, ...) and (R, O); peft's factor and the guidance factor are in `up`.
    """

    rank: int
    down: dict[str, Tensor]
    up: dict[str, Tensor]


@dataclass(frozen=True)
class PeerModel:
    """What a peer's file becomes.

    Attributes:
        shared: LoRAs that always work; layers may differ, missing ones get zeros.
        routed: a LoRA whose gates are one for every image, so that `strength` scales it; or None.
        whole: parameters of the base that were trained whole, by our names.
        one_step: the timestep and parametrization it was trained with.
    """

    shared: Sequence[PeerLora]
    routed: PeerLora | None
    whole: dict[str, Tensor] = field(default_factory=dict)
    one_step: OneStepConfig = field(default_factory=OneStepConfig)


def read_osediff(path: str | os.PathLike[str]) -> PeerModel:
    """Read OSEDiff's `.pkl`: a LoRA on the UNet, one on the VAE encoder, and the UNet's conv_in, trained whole.

    Raises:
        WeightsError: not such a file; the message names the keys that are missing or unknown.

    Source: cswry/OSEDiff, osediff.py (OSEDiff_gen.save_model, OSEDiff_test.load_ckpt).
    """
    lists = {f"unet_lora_{group}_modules": f"default_{group}" for group in _GROUPS}
    content = _read(
        path, {"rank_unet", "rank_vae", "state_dict_unet", "state_dict_vae", "vae_lora_encoder_modules", *lists}
    )
    unet, vae = _tensors(path, content, "state_dict_unet"), _tensors(path, content, "state_dict_vae")
    adapters = {adapter: _layers(path, content, key) for key, adapter in lists.items()}
    # peft wraps conv_in, which is adapted too; a file whose LoRA leaves it out has the plain name.
    inner = "conv_in.base_layer." if "conv_in" in adapters["default_encoder"] else "conv_in."
    whole = {f"{inner}{key}": f"unet.conv_in.{key}" for key in ("weight", "bias")}
    rank = _rank(path, content, "rank_unet")
    encoder = {"default_encoder": _layers(path, content, "vae_lora_encoder_modules")}
    on_unet = _take_lora(path, "state_dict_unet", unet, adapters, rank, prefix="unet.", others=set(whole))
    on_vae = _take_lora(path, "state_dict_vae", vae, encoder, _rank(path, content, "rank_vae"), prefix="vae.")
    return PeerModel(
        shared=[_join(on_unet, on_vae)],
        routed=None,
        whole={ours: unet[theirs].float() for theirs, ours in whole.items()},
        one_step=OneStepConfig(timestep=999, parametrization="epsilon"),
    )


def read_pisasr(path: str | os.PathLike[str], *, pixel: float = 1.0, semantic: float = 1.0) -> PeerModel:
    """Read PiSA-SR's `.pkl`: a pixel and a semantic LoRA on the UNet.

    The pixel ranks become shared ranks, the semantic ones ranks whose gates are always one: `strength` of the
    restorer scales them further. Factors act on the weights. At pixel = 1 that is PiSA-SR's own result for semantic
    factors 0 and 1; between and beyond it mixes two predictions of the UNet instead, which needs two passes.

    Args:
        pixel: factor on the pixel LoRA.
        semantic: factor on the semantic LoRA.

    Raises:
        WeightsError: not such a file; the message names the keys that are missing or unknown.
        ConfigError: a factor that is not finite.

    Source: csslc/PiSA-SR, pisasr.py (PiSASR.save_model, PiSASR_eval).
    """
    for name, factor in (("pixel", pixel), ("semantic", semantic)):
        if not abs(factor) < float("inf"):
            raise ConfigError(f"{name}: expected a finite factor, got {factor}")
    lists = {
        f"unet_lora_{group}_modules_{kind}": f"default_{group}_{kind}" for kind in ("pix", "sem") for group in _GROUPS
    }
    content = _read(path, {"lora_rank_unet_pix", "lora_rank_unet_sem", "state_dict_unet", *lists})
    state = _tensors(path, content, "state_dict_unet")
    loras, wanted = {}, {}
    for kind in ("pix", "sem"):
        rank = _rank(path, content, f"lora_rank_unet_{kind}")
        adapters = {adapter: _layers(path, content, key) for key, adapter in lists.items() if adapter.endswith(kind)}
        loras[kind] = (adapters, rank)
        wanted[kind] = set(_lora_keys(adapters))
    found = {
        kind: _take_lora(
            path, "state_dict_unet", state, adapters, rank, prefix="unet.",
            others=wanted["sem" if kind == "pix" else "pix"], factor=pixel if kind == "pix" else semantic,
        )
        for kind, (adapters, rank) in loras.items()
    }  # fmt: skip
    return PeerModel(
        shared=[found["pix"]],
        routed=found["sem"],
        one_step=OneStepConfig(timestep=1, parametrization="residual"),
    )


def save_peer(
    path: str | os.PathLike[str],
    peer: PeerModel,
    *,
    base: str | os.PathLike[str] = "sd21",
    prompt: str = "",
) -> Path:
    """Write a peer's model as an adapters file that the restorer loads.

    Args:
        path: of the file.
        peer: from `read_osediff` or `read_pisasr`.
        base: what the file names as its base. With "sd21", whose architecture is known, no weights are needed here; a
            folder or another id is loaded, and samples of its weights go into the file, so that another base is
            refused later.
        prompt: text that steers the UNet in every image, encoded by the base's text encoder when the file is loaded.

    Raises:
        WeightsError: layers or shapes that the base does not have, or a base that cannot be loaded.
    """
    loaded = _sd21() if os.fspath(base) == "sd21" else load_base(base)
    routed = peer.routed
    layers = list(dict.fromkeys(name for lora in [*peer.shared, *([routed] if routed else [])] for name in lora.down))
    _check_shapes(loaded, peer, layers)
    shared_ranks = sum(lora.rank for lora in peer.shared)
    estimator = build_estimator(ESTIMATOR)
    config = MoRConfig(
        num_ranks=shared_ranks + (routed.rank if routed else 0),
        num_shared=shared_ranks,
        top_k=routed.rank if routed else 0,
        num_zero=0,
        targets=tuple(re.escape(name) for name in layers),
        balance="plain",
    )
    names = estimator.names if routed else ()
    report = inject(loaded, config, condition_dim=len(names), score_names=names)
    # Tensors of the meta device become real ones: equal logits, so that every rank's gate is one.
    router = report.router.to_empty(device=torch.device("cpu"))
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.zero_()
        if routed:
            router.std.fill_(1)
            router.share.fill_(1 / config.num_slots)
    parts = [*peer.shared, *([routed] if routed else [])]
    for name, _, ranks in layers_of_set(loaded, "generator"):
        ranks.lora_A = _stacked(parts, name, "down", ranks.lora_A)
        ranks.lora_B = nn.Parameter(_stacked(parts, name, "up", ranks.lora_B.t()).t().contiguous())
    add_saved_modules(loaded, report, list(dict.fromkeys(name.rpartition(".")[0] for name in peer.whole)))
    for name, module in saved_modules(loaded, "generator").items():
        for key in dict(module.named_parameters()):
            setattr(module, key, nn.Parameter(peer.whole[f"{name}.{key}"]))
    extra = {
        "base": os.fspath(base),
        "estimator": dict(ESTIMATOR),
        "one_step": peer.one_step.to_dict(),
        "prompt": prompt,
    }
    base_id = "" if os.fspath(base) == "sd21" else loaded.base_id
    return save_adapters(path, loaded, name="generator", base_id=base_id, extra=extra)


def _sd21() -> Base:
    """Stable Diffusion 2.1-base without weights: its layers and their shapes only."""
    with torch.device("meta"):
        return random_base("sd21")


def _stacked(parts: Sequence[PeerLora], name: str, kind: str, like: Tensor) -> nn.Parameter:
    """The ranks of all parts on one layer; zeros where a part leaves the layer alone."""
    rows = [
        getattr(part, kind)[name] if name in part.down else torch.zeros(part.rank, *like.shape[1:]) for part in parts
    ]
    return nn.Parameter(torch.cat(rows))


def _join(first: PeerLora, second: PeerLora) -> PeerLora:
    """LoRAs on different layers as one; the shorter is filled up with ranks of zeros."""
    rank = max(first.rank, second.rank)

    def filled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.cat([value, value.new_zeros(rank - len(value), *value.shape[1:])])
            for name, value in tensors.items()
        }

    return PeerLora(rank, filled({**first.down, **second.down}), filled({**first.up, **second.up}))


def _read(path: str | os.PathLike[str], wanted: set[str]) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive surfaces as any of half a dozen kinds
        with open(path, "rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] != b"\x80":  # a zip archive, or the pickle of older versions
            raise WeightsError(f"{path}: expected the published .pkl; this is no file written by torch.save") from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise WeightsError(f"{path}: cannot be read as tensors and plain values ({reason})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dictionary, got {type(content).__name__}")
    _check_keys(path, "", wanted, set(content))
    return content


def _check_keys(path: str | os.PathLike[str], where: str, wanted: set[str], found: set[str]) -> None:
    missing, unknown = sorted(wanted - found), sorted(map(str, found - wanted))
    if missing or unknown:
        parts = [
            f"{len(keys)} {what}: {_some(keys)}" for keys, what in ((missing, "missing"), (unknown, "unknown")) if keys
        ]
        raise WeightsError(
            f"{path}: keys{where and f' of {where}'} differ from the published layout; {'; '.join(parts)}"
        )


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _tensors(path: str | os.PathLike[str], content: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    state = content[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: {key}: expected a dictionary of tensors")
    for name, value in state.items():
        if not value.isfinite().all():
            raise WeightsError(f"{path}: {key}: {name} holds NaN or infinity")
    return dict(state)


def _layers(path: str | os.PathLike[str], content: Mapping[str, Any], key: str) -> list[str]:
    names = content[key]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{path}: {key}: expected a list of layer names, got {type(names).__name__}")
    return list(dict.fromkeys(names))  # OSEDiff lists a layer once per pattern that it matched


def _rank(path: str | os.PathLike[str], content: Mapping[str, Any], key: str) -> int:
    rank = content[key]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise WeightsError(f"{path}: {key}: expected a whole number of at least 1, got {rank!r}")
    return rank


def _lora_keys(adapters: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """The keys that adapters on layers have in peft, with the layer and A or B."""
    return {
        f"{layer}.lora_{part}.{adapter}.weight": (layer, part)
        for adapter, layers in adapters.items()
        for layer in layers
        for part in "AB"
    }


def _take_lora(
    path: str | os.PathLike[str],
    where: str,
    state: Mapping[str, Tensor],
    adapters: Mapping[str, Sequence[str]],
    rank: int,
    *,
    prefix: str,
    others: set[str] = frozenset(),  # type: ignore[assignment]
    factor: float = 1.0,
) -> PeerLora:
    """The LoRA of some adapters of a state, which must hold its keys, the other ones named, and nothing else."""
    keys = _lora_keys(adapters)
    _check_keys(path, where, {*keys, *others}, set(state))
    twice = sorted({layer for layer, _ in keys.values() if sum(layer in layers for layers in adapters.values()) > 1})
    if twice:
        raise WeightsError(f"{path}: layers that stand in two lists: {_some(twice)}")
    down, up = {}, {}
    for key, (layer, part) in keys.items():
        value = state[key].float()
        ranks = value.shape[0 if part == "A" else 1] if value.ndim in (2, 4) else None
        if ranks != rank:
            raise WeightsError(f"{path}: {where}: {key} has shape {tuple(value.shape)}, expected rank {rank}")
        if part == "A":
            down[f"{prefix}{layer}"] = value
        else:
            up[f"{prefix}{layer}"] = value.flatten(1).t() * (factor * PEFT_DEFAULT_ALPHA / rank)
    return PeerLora(rank, down, up)


def _check_shapes(base: Base, peer: PeerModel, layers: Sequence[str]) -> None:
    modules = dict(base.named_modules())
    unknown = [name for name in layers if not isinstance(modules.get(name), (nn.Linear, nn.Conv2d))]
    unknown += [name for name in peer.whole if name.rpartition(".")[0] not in modules]
    if unknown:
        raise WeightsError(
            f"the base {base.source or 'sd21'!r} has no layers {_some(unknown)}; was the file made for another?"
        )
    odd = []
    for lora in [*peer.shared, *([peer.routed] if peer.routed else [])]:
        for name, down in lora.down.items():
            shape = (lora.up[name].shape[1], *down.shape[1:])
            if shape != tuple(modules[name].weight.shape):
                odd.append(f"{name} {shape}, not {tuple(modules[name].weight.shape)}")
    for name, value in peer.whole.items():
        shape = tuple(base.get_parameter(name).shape)
        if tuple(value.shape) != shape:
            odd.append(f"{name} {tuple(value.shape)}, not {shape}")
    if odd:
        raise WeightsError(f"shapes that differ from those of the base {base.source or 'sd21'!r}: {_some(odd, 4)}")
