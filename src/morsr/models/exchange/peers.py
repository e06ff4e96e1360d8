"""Checkpoints of OSEDiff and PiSA-SR, read key by key into our adapters over the same base.

Both peers publish one torch file with the names of their LoRA's layers, its rank, and the tensors under peft's names,
`<layer>.lora_A.<adapter>.weight`. They were trained with peft's default alpha of 8, which the files do not say. What a
file holds and what it announces must be the same set of keys; nothing in it is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morsr.adapters import MoRConfig, inject, layers_of_set, save_adapters
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


class PeerLora(NamedTuple):
    """One LoRA of a peer's file.

    rank: per layer. down, up: by our layer names, (R, ...) and (R, O); peft's factor is in `up`.
    """

    rank: int
    down: dict[str, Tensor]
    up: dict[str, Tensor]


class PeerModel(NamedTuple):
    """What a peer's file becomes.

    shared: a LoRA that always works. routed: one whose gates are one for every image, so that `strength` scales it, or
    None. whole: parameters of the base that were trained whole, by our names. one_step: what it was trained with.
    """

    shared: PeerLora
    routed: PeerLora | None
    whole: dict[str, Tensor]
    one_step: OneStepConfig


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
    adapters = {adapter: content[key] for key, adapter in lists.items()}
    # peft wraps conv_in, which is adapted too; a file whose LoRA leaves it out has the plain name.
    inner = "conv_in.base_layer." if "conv_in" in adapters["default_encoder"] else "conv_in."
    whole = {f"{inner}{key}": f"unet.conv_in.{key}" for key in ("weight", "bias")}
    rank, state = content["rank_unet"], content["state_dict_unet"]
    unet = _take_lora(path, state, adapters, rank, prefix="unet.", others=set(whole))
    encoder = {"default_encoder": content["vae_lora_encoder_modules"]}
    vae = _take_lora(path, content["state_dict_vae"], encoder, rank, prefix="vae.")
    return PeerModel(
        shared=PeerLora(rank, {**unet.down, **vae.down}, {**unet.up, **vae.up}),
        routed=None,
        whole={ours: state[theirs].float() for theirs, ours in whole.items()},
        one_step=OneStepConfig(timestep=999, parametrization="epsilon"),
    )


def read_pisasr(path: str | os.PathLike[str]) -> PeerModel:
    """Read PiSA-SR's `.pkl`: a pixel and a semantic LoRA on the UNet.

    The pixel ranks become shared ranks, the semantic ones ranks whose gates are always one: `strength` of the
    restorer scales them. At 0 and 1 that is PiSA-SR's own result for its semantic factor; between and beyond it mixes
    two predictions of the UNet instead, which needs two passes.

    Raises:
        WeightsError: not such a file; the message names the keys that are missing or unknown.

    Source: csslc/PiSA-SR, pisasr.py (PiSASR.save_model, PiSASR_eval).
    """
    lists = {
        f"unet_lora_{group}_modules_{kind}": f"default_{group}_{kind}" for kind in ("pix", "sem") for group in _GROUPS
    }
    content = _read(path, {"lora_rank_unet_pix", "lora_rank_unet_sem", "state_dict_unet", *lists})
    adapters = {
        kind: {adapter: content[key] for key, adapter in lists.items() if adapter.endswith(kind)}
        for kind in ("pix", "sem")
    }
    found = {}
    for kind, other in (("pix", "sem"), ("sem", "pix")):
        found[kind] = _take_lora(
            path, content["state_dict_unet"], adapters[kind], content[f"lora_rank_unet_{kind}"],
            prefix="unet.", others=set(_lora_keys(adapters[other])),
        )  # fmt: skip
    return PeerModel(found["pix"], found["sem"], {}, OneStepConfig(timestep=1, parametrization="residual"))


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
    parts = [peer.shared, *([peer.routed] if peer.routed else [])]
    routed_ranks = peer.routed.rank if peer.routed else 0
    estimator = build_estimator(ESTIMATOR)
    config = MoRConfig(
        num_ranks=peer.shared.rank + routed_ranks,
        num_shared=peer.shared.rank,
        top_k=routed_ranks,
        num_zero=0,
        targets=tuple(dict.fromkeys(re.escape(name) for part in parts for name in part.down)),
        balance="plain",
    )
    names = estimator.names if peer.routed else ()
    try:
        report = inject(loaded, config, condition_dim=len(names), score_names=names)
    except ConfigError as error:
        raise WeightsError(f"the file was made for another base than {os.fspath(base)!r}: {error}") from error
    # Tensors of the meta device become real ones: equal logits, so that every rank's gate is one.
    router = report.router.to_empty(device=torch.device("cpu"))
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.zero_()
        if peer.routed:
            router.std.fill_(1)
            router.share.fill_(1 / config.num_slots)
    for name, layer, ranks in layers_of_set(loaded, "generator"):
        downs, ups = zip(*(_ranks_on(part, name, tuple(layer.weight.shape)) for part in parts), strict=True)
        ranks.lora_A = nn.Parameter(torch.cat(downs))
        ranks.lora_B = nn.Parameter(torch.cat(ups).t().contiguous())
    add_saved_modules(loaded, report, list(dict.fromkeys(name.rpartition(".")[0] for name in peer.whole)))
    for name, module in report.copies.items():
        for key, value in dict(module.named_parameters()).items():
            whole = peer.whole[f"{name}.{key}"]
            _check_shape(f"{name}.{key}", tuple(whole.shape), tuple(value.shape))
            setattr(module, key, nn.Parameter(whole))
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


def _ranks_on(part: PeerLora, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A LoRA's ranks on a layer of this weight; zeros where it leaves the layer alone."""
    if name not in part.down:
        return torch.zeros(part.rank, *shape[1:]), torch.zeros(part.rank, shape[0])
    down, up = part.down[name], part.up[name]
    _check_shape(name, (up.shape[1], *down.shape[1:]), shape)
    return down, up


def _check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise WeightsError(f"{name}: the base has shape {expected}, the file {got}; it was made for another base")


def _read(path: str | os.PathLike[str], wanted: set[str]) -> dict[str, Any]:
    """The content of a published file: exactly the wanted keys, each of its kind."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive surfaces as any of half a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise WeightsError(f"{path}: not a published .pkl of tensors and plain values ({reason})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dictionary, got {type(content).__name__}")
    _check_keys(path, wanted, set(content))
    if wrong := sorted(key for key, value in content.items() if not _is_of_its_kind(key, value)):
        raise WeightsError(f"{path}: {wrong[0]}: expected ranks, lists of layer names, or finite tensors by name")
    return content


def _is_of_its_kind(key: str, value: Any) -> bool:
    if key.startswith("state_dict"):
        return isinstance(value, Mapping) and all(
            isinstance(one, Tensor) and bool(one.isfinite().all()) for one in value.values()
        )
    if "modules" in key:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    return isinstance(value, int) and value > 0


def _check_keys(path: str | os.PathLike[str], wanted: set[str], found: set[str]) -> None:
    missing, unknown = sorted(wanted - found), sorted(map(str, found - wanted))
    if missing or unknown:
        said = [f"{len(keys)} {what}, such as {', '.join(keys[:4])}"
                for keys, what in ((missing, "missing"), (unknown, "unknown")) if keys]  # fmt: skip
        raise WeightsError(f"{path}: keys differ from the published layout: {'; '.join(said)}")


def _lora_keys(adapters: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """The keys that adapters on layers have in peft, with the layer and A or B."""
    return {
        f"{layer}.lora_{part}.{adapter}.weight": (layer, part)
        for adapter, layers in adapters.items()
        for layer in layers  # OSEDiff lists a layer once per pattern that it matched
        for part in "AB"
    }


def _take_lora(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    adapters: Mapping[str, Sequence[str]],
    rank: int,
    *,
    prefix: str,
    others: Set[str] = frozenset(),
) -> PeerLora:
    """The LoRA of some adapters of a state, which must hold its keys, the other ones named, and nothing else."""
    keys, down, up = _lora_keys(adapters), {}, {}
    _check_keys(path, {*keys, *others}, set(state))
    for key, (layer, part) in keys.items():
        value = state[key].float()
        if value.ndim not in (2, 4) or value.shape["AB".index(part)] != rank:
            raise WeightsError(f"{path}: {key} has shape {tuple(value.shape)}, expected rank {rank}")
        if part == "A":
            down[f"{prefix}{layer}"] = value
        else:
            up[f"{prefix}{layer}"] = value.flatten(1).t() * (PEFT_DEFAULT_ALPHA / rank)
    if 2 * len(down) < len(keys):
        raise WeightsError(f"{path}: a layer stands in two lists")
    return PeerLora(rank, down, up)
