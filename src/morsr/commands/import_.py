"""`morsr import`: a peer's published weights as an adapters file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from morsr.errors import InputError

HELP = (
    "Turn the published .pkl of OSEDiff or PiSA-SR into an adapters file for the restorer. Every key is accounted for, "
    "and nothing in the file is executed. Both run on Stable Diffusion 2.1-base, which is not needed here."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    peers = parser.add_subparsers(dest="peer", metavar="osediff|pisasr", required=True)
    for name, text in (("osediff", "cswry/OSEDiff, osediff.pkl"), ("pisasr", "csslc/PiSA-SR, pisa_sr.pkl")):
        peer = peers.add_parser(name, help=text, description=f"Import {text}.")
        peer.add_argument("file", metavar="FILE", help="the published .pkl")
        peer.add_argument("output", metavar="OUT", help="adapters file to write, .safetensors")
        peer.add_argument(
            "--base",
            default="sd21",
            help="base to name in the file: a folder or hub id, whose weights are then sampled (default: sd21, unread)",
        )
        peer.add_argument(
            "--prompt", default="", help="text that steers every image; the base must have its text encoder"
        )
        if name == "pisasr":
            peer.add_argument("--pixel", type=float, default=1.0, help="factor on the pixel LoRA (default: 1)")
            peer.add_argument("--semantic", type=float, default=1.0, help="factor on the semantic LoRA (default: 1)")


def run(options: argparse.Namespace) -> int:
    """Import the file.

    Raises:
        InputError: an output that is no .safetensors.
        WeightsError: a file of another layout, or a base that it does not fit.
    """
    from morsr.models.exchange.peers import read_osediff, read_pisasr, save_peer

    target = Path(options.output).expanduser()
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: expected a name that ends in .safetensors")
    if options.peer == "osediff":
        peer = read_osediff(options.file)
    else:
        peer = read_pisasr(options.file, pixel=options.pixel, semantic=options.semantic)
    save_peer(target, peer, base=options.base, prompt=options.prompt)
    for kind, lora in [("shared", lora) for lora in peer.shared] + ([("routed", peer.routed)] if peer.routed else []):
        _say(f"{lora.rank} {kind} ranks on {len(lora.down)} layers")
    for name, value in peer.whole.items():
        _say(f"{name} {tuple(value.shape)}, trained whole")
    _say(f"{target}: t = {peer.one_step.timestep}, {peer.one_step.parametrization}; base {options.base}")
    _say(f"morsr upscale IN OUT --model {target} --color adain")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
