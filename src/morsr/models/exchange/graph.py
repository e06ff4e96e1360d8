"""A model as an ONNX graph: LR image in, SR image out, with one fixed routing or with estimator and router inside.

Everything is written on tensors and without branches, because an image's size is a symbol while a network is exported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from morsr.errors import ConfigError, InputError, MissingDependencyError
from morsr.estimators.learned import LearnedEstimator, crop_statistics
from morsr.estimators.views import CROP, GRID
from morsr.files import expanded
from morsr.functional.resample import edge_index
from morsr.functional.severity import worst
from morsr.models.exchange.fixed import export_diffusers
from morsr.models.generator import OneStepGenerator
from morsr.models.loading import load_generator

ONE_FILE_BYTES = 1_500_000_000
"""Above this the weights go beside the ONNX file, for a protobuf message holds 2 GiB at most."""


class TensorGenerator(nn.Module):
    """LR image to SR image with nothing but tensors.

    Args:
        generator: in evaluation mode; without adapters, or with a learned estimator.
        scale: whole enlargement.
    """

    def __init__(self, generator: OneStepGenerator, scale: int) -> None:
        super().__init__()
        self.generator, self.scale = generator, scale

    def forward(self, lr: Tensor) -> tuple[Tensor, ...]:
        """Images (1, 3, h, w) in [0, 1] to (1, 3, scale·h, scale·w) in [0, 1], and scores (1, D) if they are routed."""
        adapters = self.generator.adapters
        if adapters is None:
            return (self.restore(lr),)
        scores = self.scores(lr)
        gates = adapters.router.rank_gates(adapters.router(scores), strength=adapters.strength)
        with adapters.switch.set(adapters.name, {adapters.name: gates.unbind(0)}):
            return self.restore(lr), scores

    def restore(self, lr: Tensor) -> Tensor:
        """Enlarge, pad, run the networks once, cut, and shrink where they work at a larger scale, as the restorer."""
        shrink = self.generator.one_step.shrink(self.scale)
        factor, multiple = float(self.scale * shrink), self.generator.base.multiple
        enlarged = F.interpolate(lr, scale_factor=(factor, factor), mode="bicubic", align_corners=False).clamp(0, 1)
        height, width = enlarged.shape[-2:]
        rows, columns = (
            edge_index(torch.arange(side + -side % multiple, device=lr.device), side) for side in (height, width)
        )
        padded = enlarged.index_select(-2, rows).index_select(-1, columns)
        latents = self.generator.denoise(self.generator.encode(padded))
        images = self.generator.decode(latents)[..., :height, :width]
        return (F.avg_pool2d(images, shrink) if shrink > 1 else images).clamp(0, 1)

    def scores(self, lr: Tensor) -> Tensor:
        """Degradation scores (1, D), as the estimator gives them, of an image of at least 128 pixels a side."""
        estimator, (crops, weights) = self.generator.estimator, _crops(lr)
        if not isinstance(estimator, LearnedEstimator):
            kind = type(estimator).__name__
            raise ConfigError(f"live routing: expected a learned estimator, got {kind}; fix the routing by --image")
        scores = (estimator.net(crop_statistics(crops)) * weights).sum(0, keepdim=True).clamp(0, 1)
        return torch.cat([scores, worst(scores, estimator.names[:-1])[:, None]], 1) if estimator.worst else scores


def _crops(lr: Tensor) -> tuple[Tensor, Tensor]:
    """The crops of `mean_over_crops` (9, 3, 128, 128) of one image, always as many, and their weights (9, 1), sum 1.

    An image with fewer crops along a side has the others too, with weight 0.
    """
    taken, weights = lr, []
    for axis in (-2, -1):
        size = lr.shape[axis]
        rest = size - CROP
        starts = (0, (rest + 1) // 2 // 8 * 8, rest // 8 * 8)
        taken = taken.index_select(axis, torch.cat([torch.arange(CROP, device=lr.device) + start for start in starts]))
        length = torch.zeros((), device=lr.device) + size
        weights.append(torch.stack([length > 0, length > 2 * CROP, length > CROP]).float())
    crops = rearrange(taken.view(1, 3, GRID, CROP, GRID, CROP), "1 c i h j w -> (i j) c h w")
    weight = torch.outer(*weights).flatten()[:, None]
    return crops, weight / weight.sum()


def export_onnx(
    path: str | os.PathLike[str], generator: OneStepGenerator, *, scale: int = 4, live: bool = False
) -> float:
    """Write an ONNX file: `lr` (1, 3, h, w) in [0, 1] to `sr`, and with live routing the degradation scores.

    Enlargement and padding are inside, tiles and colour correction are not: the file gives what the restorer gives with
    color="none" and tile=None. It is run with onnxruntime before it takes its place.

    Args:
        path: of the file; weights beyond 1.5 GB go into `<path>.data`.
        generator: in evaluation mode, with its routing set unless it is live.
        scale: enlargement, a whole number from 1 to 8, since sizes in the file are products.
        live: every image is scored and routed inside the file, which then takes images from 128 pixels a side on.
            False: under the present routing, images of any size. A model that routes nothing has no live routing.

    Returns:
        The largest difference to the generator in [0, 1] for one image.

    Raises:
        ConfigError: another scale, or live routing by another estimator than `learned`.
        InputError: no routing is set and none is live, or a path that cannot be written.
        MissingDependencyError: onnx, onnxruntime or onnxscript are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"{', '.join(missing)} not installed; pip install 'morsr[onnx]'")
    import onnxruntime

    if not 1 <= scale <= 8:
        raise ConfigError(f"scale: expected a whole number from 1 to 8 for ONNX, got {scale}")
    path, adapters = expanded(path), generator.adapters
    live = live and adapters is not None and adapters.is_routed
    described = {"scale": scale, "color": "none", "routing": "live" if live else "fixed"}
    described |= {} if adapters is None else {"strength": adapters.strength}
    if live:
        network = TensorGenerator(generator, scale).eval()
    else:
        with tempfile.TemporaryDirectory() as folder:
            plain = load_generator(export_diffusers(Path(folder) / "merged", generator))
        network = TensorGenerator(plain, scale).eval()
    image = torch.rand(1, 3, *((CROP + 9, CROP + 5) if live else (17, 13)))  # sides that fit no grid
    side = {"min": CROP} if live else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        # Before the export, which must find the estimator's cached constants filled.
        expected = network(image)[0]
        program = torch.onnx.export(
            network, (image,), input_names=["lr"], output_names=["sr", "scores"][: 1 + live], dynamo=True,
            dynamic_shapes={"lr": {axis: torch.export.Dim.DYNAMIC(**side) for axis in (2, 3)}}, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["morsr"] = json.dumps(described)
    size = sum(parameter.nbytes for parameter in network.parameters())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".morsr-", dir=path.parent) as beside:
            # Under its final name already, by which the file refers to its weights.
            made = Path(beside) / path.name
            program.save(str(made), external_data=size > ONE_FILE_BYTES)
            session = onnxruntime.InferenceSession(str(made), providers=["CPUExecutionProvider"])
            (output,) = session.run(["sr"], {"lr": image.numpy()})
            for file in sorted(made.parent.iterdir(), reverse=True):  # the weights first
                file.replace(path.parent / file.name)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return (torch.from_numpy(output) - expected).abs().max().item()
