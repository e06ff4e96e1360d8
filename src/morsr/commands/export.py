"""`morsr export`: the model in forms that other programs read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from morsr.commands._model import add_model_arguments, model_arguments
from morsr.errors import ConfigError, InputError

HELP = (
    "Fix the routing of one image, or of given degradation scores, and write the model with it: as LoRA files of "
    "diffusers and peft, as a diffusers folder with the ranks folded into the weights, or as an ONNX file."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    forms = parser.add_subparsers(dest="form", metavar="lora|diffusers|onnx", required=True)
    for name, text in (
        ("lora", "a folder OUT for diffusers' load_lora_weights, the VAE's ranks as a peft folder OUT/vae"),
        ("diffusers", "a folder OUT with vae, unet and scheduler, ranks folded in"),
        ("onnx", "a file OUT for images of any size, without tiles and colour correction"),
    ):
        form = forms.add_parser(name, help=text, description=f"Export {text}.")
        form.add_argument("output", metavar="OUT")
        add_model_arguments(form)
        form.add_argument("--image", help="the image whose routing is fixed")
        form.add_argument("--scores", metavar="S1,S2,…", help="degradation scores instead of an image, each in [0, 1]")
        form.add_argument("--strength", type=float, default=1.0, help="factor on the routed ranks (default: 1)")
        if name == "diffusers":
            form.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the stored weights")
        if name == "onnx":
            form.add_argument("--scale", type=int, default=4, help="whole enlargement, 1 to 8 (default: 4)")


def run(options: argparse.Namespace) -> int:
    """Export the model.

    Raises:
        MorsrError: a setting without effect, a model that cannot be loaded, or a form that cannot hold it.
    """
    import torch

    from morsr.models.exchange import fixed, graph, lora
    from morsr.models.loading import load_generator

    scores = _numbers(options.scores)
    target = Path(options.output).expanduser()
    if options.form != "onnx" and target.is_file():
        raise InputError(f"{target}: expected a folder to export into, this is a file")
    if options.form == "onnx" and target.is_dir():
        raise InputError(f"{target}: expected a file to export into, this is a folder")
    generator = load_generator(**model_arguments(options))
    found = fixed.fix_routing(generator, image=options.image, scores=scores, strength=options.strength)
    if found:
        _say("routing of " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    if options.form == "lora":
        written = lora.export_lora(target, generator)
        for place in written.values():
            _say(str(place))
        if "vae" in written:
            _say(f"diffusers loads no LoRA into a VAE: its ranks need peft.PeftModel and {written['vae']}")
    elif options.form == "diffusers":
        dtype = getattr(torch, options.dtype) if options.dtype else None
        _say(str(fixed.export_diffusers(target, generator, dtype=dtype)))
    else:
        difference = graph.export_onnx(target, generator, scale=options.scale, live=False)
        _say(f"{target}: differs from the model by at most {difference:.1e} in onnxruntime")
    return 0


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--scores: expected numbers with commas between them, got {text!r}") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr)
