"""Checkpoints of OSEDiff and PiSA-SR, read key by key into our adapters over the same base.

Both peers publish one torch file with the rank of their LoRA and the tensors under peft's names,
`<layer>.lora_A.<adapter>.weight`. They were trained with peft's default alpha of 8, which the files do not say. A key
that is not known is refused; nothing in a file is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from morsr.adapters import MoRConfig, inject, save_adapters
from morsr.adapters.inject import add_saved_modules, layers_of_set
from morsr.errors import ConfigError, WeightsError
from morsr.estimators import build_estimator
from morsr.models.bases import load_base, random_base
from morsr.models.generator import OneStepConfig

PEFT_DEFAULT_ALPHA = 8
"""lora_alpha of a LoraConfig that does not set it; the update's factor is alpha / rank, 2 at their rank of 4."""

_GROUPS = "(?:encoder|decoder|others)"


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
    content = _read(path, "rank_unet", "state_dict_unet", "state_dict_vae")
    rank, state = content["rank_unet"], content["state_dict_unet"]
    unet, rest = _take_lora(path, state, f"default_{_GROUPS}", rank, "unet.")
    vae, other = _take_lora(path, content["state_dict_vae"], "default_encoder", rank, "vae.")
    whole = {f"conv_in.base_layer.{key}": f"unet.conv_in.{key}" for key in ("weight", "bias")}
    _check_keys(path, set(whole), {*rest, *other})
    _check_layers(path, content, f"unet_lora_{_GROUPS}_modules", "unet.", unet)
    _check_layers(path, content, "vae_lora_encoder_modules", "vae.", vae)
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
    content = _read(path, "lora_rank_unet_pix", "lora_rank_unet_sem", "state_dict_unet")
    state = content["state_dict_unet"]
    pixel, rest = _take_lora(path, state, f"default_{_GROUPS}_pix", content["lora_rank_unet_pix"], "unet.")
    semantic, rest = _take_lora(path, rest, f"default_{_GROUPS}_sem", content["lora_rank_unet_sem"], "unet.")
    _check_keys(path, set(), set(rest))
    _check_layers(path, content, f"unet_lora_{_GROUPS}_modules_pix", "unet.", pixel)
    _check_layers(path, content, f"unet_lora_{_GROUPS}_modules_sem", "unet.", semantic)
    return PeerModel(pixel, semantic, {}, OneStepConfig(timestep=1, parametrization="residual"))


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
    if os.fspath(base) == "sd21":
        with torch.device("meta"):  # its layers and their shapes only
            loaded = random_base("sd21")
    else:
        loaded = load_base(base)
    parts = [peer.shared, *([peer.routed] if peer.routed else [])]
    routed_ranks = peer.routed.rank if peer.routed else 0
    estimator = build_estimator("frequency")  # nothing is routed by degradation; scores are for the reports only
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
        down, up = torch.cat([part.down[name] for part in parts]), torch.cat([part.up[name] for part in parts])
        _check_shape(name, (up.shape[1], *down.shape[1:]), tuple(layer.weight.shape))
        ranks.lora_A, ranks.lora_B = nn.Parameter(down), nn.Parameter(up.t().contiguous())
    add_saved_modules(loaded, report, list(dict.fromkeys(name.rpartition(".")[0] for name in peer.whole)))
    for name, module in report.copies.items():
        for key, value in dict(module.named_parameters()).items():
            whole = peer.whole[f"{name}.{key}"]
            _check_shape(f"{name}.{key}", tuple(whole.shape), tuple(value.shape))
            setattr(module, key, nn.Parameter(whole))
    extra = {
        "base": os.fspath(base),
        "estimator": estimator.spec,
        "one_step": peer.one_step.to_dict(),
        "prompt": prompt,
    }
    base_id = "" if os.fspath(base) == "sd21" else loaded.base_id
    return save_adapters(path, loaded, name="generator", base_id=base_id, extra=extra)


def _check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise WeightsError(f"{name}: the base has shape {expected}, the file {got}; it was made for another base")


def _read(path: str | os.PathLike[str], *wanted: str) -> dict[str, Any]:
    """The content of a published file, which has at least the wanted keys."""
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive surfaces as any of half a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise WeightsError(f"{path}: not a published .pkl of tensors and plain values ({reason})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dictionary, got {type(content).__name__}")
    _check_keys(path, set(wanted), set(wanted).intersection(content))
    return content


def _check_keys(path: str | os.PathLike[str], wanted: set[str], found: set[str]) -> None:
    missing, unknown = sorted(wanted - found), sorted(map(str, found - wanted))
    if missing or unknown:
        said = [f"{len(keys)} {what}, such as {', '.join(keys[:4])}"
                for keys, what in ((missing, "missing"), (unknown, "unknown")) if keys]  # fmt: skip
        raise WeightsError(f"{path}: keys differ from the published layout: {'; '.join(said)}")


def _check_layers(
    path: str | os.PathLike[str], content: dict[str, Any], lists: str, prefix: str, lora: PeerLora
) -> None:
    """Refuse a LoRA whose layers are not those that the file lists."""
    names = {f"{prefix}{name}" for key, listed in content.items() if re.fullmatch(lists, key) for name in listed}
    _check_keys(path, names, set(lora.down))


def _take_lora(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], adapters: str, rank: int, prefix: str
) -> tuple[PeerLora, dict[str, Tensor]]:
    """The LoRA of the adapters of a state whose names match a pattern, and the tensors that are not of it."""
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    rest = {}
    for key, value in state.items():
        found = re.fullmatch(rf"(.+)\.lora_([AB])\.{adapters}\.weight", key)
        if found is None:
            rest[key] = value
        elif value.ndim not in (2, 4) or value.shape["AB".index(found[2])] != rank:
            raise WeightsError(f"{path}: {key} has shape {tuple(value.shape)}, expected rank {rank}")
        elif found[2] == "A":
            down[f"{prefix}{found[1]}"] = value.float()
        else:
            up[f"{prefix}{found[1]}"] = value.float().flatten(1).t() * (PEFT_DEFAULT_ALPHA / rank)
    _check_keys(path, set(down), set(up))
    return PeerLora(rank, down, up), rest
