"""`morsr import`: a peer's published weights as an adapters file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from morsr.commands._common import say
from morsr.errors import InputError


def run(
    peer: Literal["osediff", "pisasr"],
    file: Path,
    output: Path,
    *,
    base: str = "sd21",
    prompt: str = "",
) -> int:
    """Turn the published .pkl of OSEDiff or PiSA-SR into an adapters file for the restorer.

    Every key is accounted for, and nothing in the file is executed. Both run on Stable Diffusion 2.1-base, which is not
    needed here.

    Args:
        peer: osediff (cswry/OSEDiff, osediff.pkl) or pisasr (csslc/PiSA-SR, pisa_sr.pkl)
        file: the published .pkl
        output: adapters file to write, .safetensors
        base: base to name in the file: a folder or hub id, whose weights are then sampled (sd21 stays unread)
        prompt: text that steers every image; the base must have its text encoder
    """
    from morsr.models.exchange.peers import read_osediff, read_pisasr, save_peer

    if output.suffix != ".safetensors":
        raise InputError(f"{output}: expected a name that ends in .safetensors")
    read = read_osediff(file) if peer == "osediff" else read_pisasr(file)
    save_peer(output, read, base=base, prompt=prompt)
    for kind, lora in (("shared", read.shared), ("routed", read.routed)):
        if lora is not None:
            say(f"{lora.rank} {kind} ranks on {len(lora.down)} layers")
    for name, value in read.whole.items():
        say(f"{name} {tuple(value.shape)}, trained whole")
    say(f"{output}: t = {read.one_step.timestep}, {read.one_step.parametrization}; base {base}")
    say(f"morsr upscale IN OUT --model {output} --color adain")
    return 0
