"""`morsr export`: the model in forms that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from morsr.commands._common import say
from morsr.errors import ConfigError, InputError


def run(
    form: Literal["lora", "diffusers", "onnx"],
    output: Path,
    *,
    model: str = "tiny",
    base: str | None = None,
    prompt: str | None = None,
    estimator: str | None = None,
    router: str | None = None,
    image: Path | None = None,
    strength: NonNegativeFloat = 1.0,
    scale: PositiveInt | None = None,
) -> int:
    """Fix the routing of one image and write the model with it.

    Args:
        form: lora (a folder for diffusers' load_lora_weights, the VAE's ranks as a peft folder in it), diffusers (a
            folder with the ranks folded into the weights) or onnx (a file without tiles and colour correction, which
            scores and routes every image of 128 pixels a side or more; with an image: any size, one routing)
        output: folder; file for onnx
        model: shipped preset, adapters file, saved folder or checkpoint
        base: folder or hub id of the base model, if the adapters do not bring it, or class path of your own
        prompt: text instead of the model's own; the base must have its text encoder
        estimator: class path of an estimator of your own, or where CLIP's or the learned one's weights are
        router: class path of a router of your own
        image: the image whose routing is fixed
        strength: factor on the routed ranks
        scale: whole enlargement, 1 to 8, onnx (default: 4)
    """
    from morsr.models.exchange import fixed, graph
    from morsr.models.loading import load_generator

    if scale is not None and form != "onnx":
        raise ConfigError(f"--scale goes with onnx, got {form}")
    if form != "onnx" and output.is_file():
        raise InputError(f"{output}: expected a folder to export into, this is a file")
    if form == "onnx" and output.is_dir():
        raise InputError(f"{output}: expected a file to export into, this is a folder")
    generator = load_generator(model, base=base, prompt=prompt, estimator=estimator, router=router)
    adapters = generator.adapters
    live = form == "onnx" and image is None
    if live and adapters is not None and adapters.is_routed:
        adapters.strength = strength
    else:
        found = fixed.fix_routing(generator, image=image, strength=strength)
        if found:
            say("routing of " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    if form == "lora":
        written = fixed.export_lora(output, generator)
        for place in written.values():
            say(str(place))
        if "vae" in written:
            say(f"diffusers loads no LoRA into a VAE: its ranks need peft.PeftModel and {written['vae']}")
    elif form == "diffusers":
        say(str(fixed.export_diffusers(output, generator)))
    else:
        difference = graph.export_onnx(output, generator, scale=scale or 4, live=live)
        say(f"{output}: differs from the model by at most {difference:.1e} in onnxruntime")
    return 0
