"""Repositories on the Hugging Face hub, named "org/name" or "org/name@revision"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morsr.errors import WeightsError
from morsr.files import say

PICKLES = (
    "files that end in .bin are pickles, which are never loaded; save them once with diffusers' or transformers' "
    "from_pretrained(…).save_pretrained(FOLDER) and give that folder, or name a repository or revision (org/name@rev) "
    "with safetensors"
)


def repository_of(name: str) -> tuple[str, str | None] | None:
    """The repository and the revision that a hub id names; None for what is no hub id.

    >>> repository_of("org/name@refs/pr/3"), repository_of("./folder")
    (('org/name', 'refs/pr/3'), None)
    """
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")) or not all(repository.split("/")):
        return None
    return repository, revision or None


def fetch(hub_id: str, patterns: Sequence[str], **options: Any) -> Path:
    """Local folder of a repository, with the files that match; only what the cache lacks is downloaded.

    Args:
        hub_id: "org/name" or "org/name@revision".
        patterns: of file names, as for fnmatch.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        WeightsError: the hub cannot be reached, breaks off, or has no such repository, and the cache holds none.
    """
    from huggingface_hub import snapshot_download

    found = repository_of(hub_id)
    if found is None:
        raise WeightsError(f"{hub_id}: expected a hub id such as org/name or org/name@revision")
    repository, revision = found
    options = {**options, "revision": options.get("revision") or revision}
    try:
        if not options.get("local_files_only"):
            say_fetching(hub_id)
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except Exception as error:  # the hub's client, its HTTP library and its transfer library each raise their own
        raise WeightsError(" ".join(str(error).split()) or type(error).__name__) from error


def say_fetching(what: str, source: str | None = None) -> None:
    """Say on standard error what the network is asked for, and by default that it is the hub; never when offline."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        say(f"morsr: fetching {what} from {source or constants.ENDPOINT}")


def half_precision(folder: Path, stem: str) -> str | None:
    """The variant "fp16" where a folder holds the weights of a network in half precision alone, else None.

    Args:
        folder: of the network.
        stem: of its files, "diffusion_pytorch_model" or "model".
    """
    whole = any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))
    return None if whole or not any(folder.glob(f"{stem}*fp16*.safetensors")) else "fp16"
