"""One fixed routing of a model in the forms that others read: a plain LoRA, a diffusers folder, an ONNX file.

With the routing fixed, a mixture of ranks is an ordinary LoRA, and folded into the weights it is no adapter at all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.adapters import merged
from morsr.errors import ConfigError, InputError, MissingDependencyError
from morsr.functional.resample import edge_index
from morsr.imaging.files import read_planes
from morsr.models.generator import OneStepGenerator
from morsr.models.loading import load_generator
from morsr.models.peft_format import export_lora as export_peft
from morsr.models.saving import save_decoder, write_description

ONE_FILE_BYTES = 1_500_000_000
"""Above this the weights go beside the ONNX file, for a protobuf message holds 2 GiB at most."""

ONNX_SIZES = ((1, 3, 24, 32), (1, 3, 17, 13))
"""LR images that an ONNX file is checked with; the second fits no grid."""


def fix_routing(
    generator: OneStepGenerator,
    *,
    image: Any = None,
    scores: Sequence[float] | None = None,
    strength: float = 1.0,
) -> dict[str, float]:
    """Set the one routing that is to be exported, from an image or from degradation scores.

    Args:
        generator: its adapters keep the routing.
        image: what the restorer takes; scored by the model's own estimator.
        scores: one number in [0, 1] per score of the estimator, in its order; instead of an image.
        strength: factor on the routed gates, as for the restorer; it is exported with the routing.

    Returns:
        The scores by name; empty where nothing is routed.

    Raises:
        ConfigError: neither or both of image and scores for a routed model, any of them for one that routes nothing,
            or a wrong number or range of scores.
    """
    adapters = generator.adapters
    if adapters is None or not adapters.is_routed:
        if image is not None or scores is not None or strength != 1.0:
            raise ConfigError("this model routes nothing: image, scores and strength have no effect")
        return {}
    count = adapters.router.num_scores
    names = adapters.score_names or tuple(f"score{index}" for index in range(count))
    if (image is None) == (scores is None):
        raise ConfigError(f"give either an image or the {count} scores {', '.join(names)}")
    adapters.strength = strength
    if scores is None:
        estimated = generator.route(read_planes(image)[:1].to(generator.device))
        values = estimated.scores[0].tolist() if estimated is not None else []
    else:
        if len(scores) != count or not all(0 <= score <= 1 for score in scores):
            raise ConfigError(f"scores: expected {count} numbers in [0, 1] ({', '.join(names)}), got {list(scores)}")
        adapters.route(torch.tensor([list(scores)], dtype=torch.float32, device=generator.device))
        values = list(scores)
    return dict(zip(names, values, strict=True))


def export_lora(folder: str | os.PathLike[str], generator: OneStepGenerator) -> list[Path]:
    """Write the present routing as plain LoRA folders of peft, one per network: `unet/` and `vae/`.

    A decoder beside the base's own, without which the image would be another, goes along whole as `decoder/`.

    Returns:
        The folders.

    Raises:
        InputError: no routing is set.
        ConfigError: no adapters, or parameters trained whole, which a LoRA cannot hold.
    """
    adapters = generator.adapters
    if adapters is None:
        raise ConfigError("this model has no adapters to export as a LoRA")
    if adapters.saved:
        raise ConfigError(
            f"{', '.join(adapters.saved)} were trained whole, which a LoRA cannot hold; export as diffusers instead"
        )
    written = []
    for part in ("unet", "vae"):
        if any(name.startswith(f"{part}.") for name in adapters.layer_names):
            network = getattr(generator.backbone, part)
            written.append(export_peft(Path(folder) / part, network, name=adapters.name))
    written += [Path(folder) / part for part in save_decoder(Path(folder), generator.backbone).values()]
    return written


def export_diffusers(
    folder: str | os.PathLike[str], generator: OneStepGenerator, *, dtype: torch.dtype | None = None
) -> Path:
    """Write the present routing, folded into the weights, as a diffusers folder with `vae/`, `unet/`, `scheduler/`.

    Diffusers loads each part by itself, from `decoder/` a decoder that works in place of the autoencoder's own;
    `Restorer.from_pretrained` loads the folder as a model without adapters.

    Args:
        folder: made if it is not there.
        generator: with its routing set.
        dtype: what the weights are stored as; their own by default.

    Raises:
        InputError: no routing is set, or the folder is a file.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise InputError(f"{folder}: expected a folder to export into, this is a file")
    with _fixed(generator):
        name = generator.adapters.name if generator.adapters is not None else None
        generator.backbone.save(folder, dtype=dtype, saved_of=name)
    description = {
        "base": ".",
        "estimator": None,
        "one_step": generator.one_step.to_dict(),
        "prompt": generator.backbone.prompt,
        **save_decoder(folder, generator.backbone, dtype=dtype),
    }
    write_description(folder, description, adapted=False)
    return folder


class TensorGenerator(nn.Module):
    """LR image to SR image with nothing but tensors: what goes into an ONNX file.

    Args:
        generator: without adapters.
        scale: whole enlargement.
    """

    def __init__(self, generator: OneStepGenerator, scale: int) -> None:
        super().__init__()
        self.generator, self.scale = generator, scale

    def forward(self, lr: Tensor) -> Tensor:
        """Images (1, 3, h, w) in [0, 1] of any size to (1, 3, scale·h, scale·w) in [0, 1]."""
        factor, multiple = float(self.scale), self.generator.multiple
        enlarged = F.interpolate(lr, scale_factor=(factor, factor), mode="bicubic", align_corners=False).clamp(0, 1)
        height, width = enlarged.shape[-2:]
        # Padded as by `pad_to_multiple`; by indices, since a size is a symbol while it is traced.
        rows, columns = (
            edge_index(torch.arange(side + -side % multiple, device=lr.device), side) for side in (height, width)
        )
        padded = enlarged.index_select(-2, rows).index_select(-1, columns)
        latents = self.generator.denoise(self.generator.encode(padded))
        return self.generator.decode(latents).clamp(0, 1)[..., :height, :width]


def export_onnx(path: str | os.PathLike[str], generator: OneStepGenerator, *, scale: int = 4) -> float:
    """Write the present routing as an ONNX file: `lr` (1, 3, h, w) in [0, 1] to `sr`, for images of any size.

    Enlargement and padding are inside, tiles and colour correction are not: the file gives what the restorer gives with
    color="none" and tile=None. It is run once with onnxruntime before it takes its place.

    Args:
        path: of the file; weights beyond 1.5 GB go into `<path>.data`.
        generator: with its routing set.
        scale: enlargement, a whole number, since sizes in the file are products.

    Returns:
        The largest difference to the generator over the images of ONNX_SIZES, in [0, 1].

    Raises:
        ConfigError: a scale that is no whole number from 1 to 8.
        InputError: no routing is set, or a path that is a folder.
        MissingDependencyError: onnx, onnxruntime or onnxscript are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"{', '.join(missing)} not installed; pip install 'morsr[onnx]'")
    if isinstance(scale, bool) or scale != int(scale) or not 1 <= scale <= 8:
        raise ConfigError(f"scale: expected a whole number from 1 to 8 for ONNX, got {scale}")
    path = Path(path).expanduser()
    if path.is_dir():
        raise InputError(f"{path}: expected a file to export into, this is a folder")
    with tempfile.TemporaryDirectory() as folder:
        plain = load_generator(export_diffusers(Path(folder) / "merged", generator))
    network = TensorGenerator(plain, int(scale)).eval()
    torch.manual_seed(0)
    images = [torch.rand(size) for size in ONNX_SIZES]
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        program = torch.onnx.export(
            network, (images[1],), input_names=["lr"], output_names=["sr"], dynamic_shapes={"lr": {2: free, 3: free}},
            dynamo=True, verbose=False,
        )  # fmt: skip
        expected = [network(image) for image in images]
    assert program is not None
    program.model.metadata_props["morsr"] = json.dumps({"scale": int(scale), "color": "none", **_scores(generator)})
    size = sum(parameter.nbytes for parameter in network.parameters())
    with _beside(path) as folder:
        # Under its own name already: the file says in which file beside it the weights are.
        program.save(str(folder / path.name), external_data=size > ONE_FILE_BYTES)
        difference = max(
            (torch.from_numpy(output) - wanted).abs().max().item()
            for output, wanted in zip(_run_onnx(folder / path.name, images), expected, strict=True)
        )
        for file in sorted(folder.iterdir(), reverse=True):  # the weights first
            file.replace(path.parent / file.name)
    return difference


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `path`.

    Raises:
        InputError: nothing can be written there, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".morsr-", dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _run_onnx(path: Path, images: Sequence[Tensor]) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [session.run(None, {"lr": image.numpy()})[0] for image in images]


def _scores(generator: OneStepGenerator) -> dict[str, Any]:
    return {} if generator.adapters is None else {"strength": generator.adapters.strength}


def _fixed(generator: OneStepGenerator) -> contextlib.AbstractContextManager[Any]:
    return (
        contextlib.nullcontext() if generator.adapters is None else merged(generator.backbone, generator.adapters.name)
    )
