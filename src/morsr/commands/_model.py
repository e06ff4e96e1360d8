"""The arguments that say which model a command runs."""

from __future__ import annotations

import argparse
from typing import Any


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --model, --base, --decoder and --prompt."""
    parser.add_argument("--model", default="tiny", help="shipped preset, adapters file, saved folder or checkpoint")
    parser.add_argument("--base", help="folder or hub id of the base model, if the adapters do not bring it")
    parser.add_argument(
        "--decoder", help="an AutoencoderTiny that decodes instead of the base's autoencoder: taesd, a folder, a hub id"
    )
    parser.add_argument("--prompt", help="text instead of the model's own; the base must have its text encoder")


def model_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What was given, as arguments of `load_generator` and `Restorer.from_pretrained`."""
    return {
        "name_or_path": options.model,
        "base": options.base,
        "decoder": options.decoder,
        "prompt": options.prompt,
    }
