"""ONNX files give our images in onnxruntime: each image by its own routing, or all by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.cli import main
from morsr.errors import ConfigError, InputError, MissingDependencyError
from morsr.estimators import build_estimator
from morsr.models.exchange import graph
from morsr.models.exchange.fixed import fix_routing
from morsr.models.generator import OneStepGenerator
from morsr.models.loading import load_generator
from morsr.restoring import Restorer

needs_onnx = pytest.mark.skipif(
    graph.importlib.util.find_spec("onnxruntime") is None, reason="needs the extra `onnx`"
)  # fmt: skip


def session(path: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def with_estimator(generator: OneStepGenerator, worst: bool) -> OneStepGenerator:
    """The generator with the learned estimator, and its router cut to as many scores."""
    generator.estimator, router = build_estimator("learned", worst=worst), generator.adapters.router
    dim = router.num_scores = generator.estimator.dim
    router.weight = nn.Parameter(torch.randn(*router.weight.shape[:2], dim) * 2)
    router.mean, router.std = torch.zeros(dim), torch.ones(dim)
    return generator


def degraded(height: int, width: int) -> dict[str, Tensor]:
    """One picture of ramps and edges, clean, noisy, blurred, in blocks."""
    rows, columns = torch.meshgrid(torch.arange(height) / 20, torch.arange(width) / 33, indexing="ij")
    clean = ((rows.sin() * columns.cos() > 0) * 0.5 + 0.2 + 0.1 * (rows * 3).sin()).expand(1, 3, height, width)
    blocks = F.interpolate(F.avg_pool2d(clean, 8, ceil_mode=True), scale_factor=8)[..., :height, :width]
    return {
        "clean": clean.contiguous(),
        "noisy": (clean + 0.1 * torch.randn_like(clean)).clamp(0, 1),
        "blurred": F.avg_pool2d(clean, 9, stride=1, padding=4),
        "blocks": blocks.contiguous(),
    }


@pytest.mark.parametrize(
    ("worst", "size"),
    [(False, (131, 257)), (True, (300, 128)), (False, (256, 200)), (False, (128, 128))],
)
def test_scores_on_tensors_are_the_estimator_s(worst, size, generator):
    """The part of the graph that exists twice; one, two and three crops a side."""
    network = graph.TensorGenerator(with_estimator(generator, worst), 2)
    found = {name: network.scores(image) for name, image in degraded(*size).items()}
    for name, image in degraded(*size).items():
        if name != "noisy":
            torch.testing.assert_close(found[name], generator.estimator(image).scores, atol=1e-4, rtol=0)
    assert (found["noisy"] - found["blurred"]).abs().max() > 0.3


@needs_onnx
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_live_routing_gives_each_image_its_ranks(generator):
    generator = with_estimator(generator, worst=False)
    assert graph.export_onnx("live.onnx", generator, scale=2, live=True) < 1e-4
    run = session("live.onnx")
    routings = []
    for (name, image), size in zip(degraded(201, 137).items(), ((128, 128), (201, 137), (140, 136)), strict=False):
        image = image[..., : size[0], : size[1]].contiguous()
        sr, scores = (torch.from_numpy(value) for value in run.run(None, {"lr": image.numpy()}))
        expected = generator(image, scale=4)  # the trained scale; the restorer shrinks it too
        torch.testing.assert_close(scores, expected.scores.scores, atol=1e-4, rtol=0, msg=name)
        torch.testing.assert_close(sr, F.avg_pool2d(expected.sr, 2).clamp(0, 1), atol=3e-4, rtol=0, msg=name)
        routings.append(expected.routing)
        if len(routings) > 1:  # under the first image's ranks it would be another image
            generator.adapters.route(routings[0])
            other = graph.TensorGenerator(generator, 2).restore(image)
            assert (other - sr).abs().max() > 1e-3
    assert not torch.equal(routings[0].gates, routings[1].gates)


@needs_onnx
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_routing_gives_the_same_image_at_any_size(adapters_file, photo, pixels, restored, capsys):
    settings = ["--model", str(adapters_file), "--image", str(photo)]
    assert main(["export", "onnx", "model.onnx", *settings]) == 0
    assert "differs from the model by at most" in capsys.readouterr().err
    Path("file").write_text("new")
    assert Path("model.onnx").stat().st_mode == Path("file").stat().st_mode
    assert not list(Path().glob(".morsr-*"))
    run = session("model.onnx")
    described = json.loads(run.get_modelmeta().custom_metadata_map["morsr"])
    assert described == {"scale": 4, "color": "none", "routing": "fixed", "strength": 1.0}
    model = load_generator(adapters_file)
    got = torch.from_numpy(run.run(None, {"lr": pixels(photo).numpy()})[0])
    torch.testing.assert_close(got, restored(model, photo), atol=1e-5, rtol=0)
    assert main(["export", "diffusers", "merged", *settings]) == 0
    merged = Restorer.from_pretrained("merged", device="cpu")
    for height, width in ((16, 16), (1, 1), (5, 40)):
        image = torch.rand(1, 3, height, width)
        (sr,) = run.run(None, {"lr": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(sr), merged(image, color="none", tile=None), atol=1e-5, rtol=0)


def test_what_no_graph_can_hold(generator, lr, tmp_path, monkeypatch):
    for settings in ({"live": False}, {"path": tmp_path}):  # no routing is fixed; a folder
        with pytest.raises(InputError):
            graph.export_onnx(settings.pop("path", "m.onnx"), generator, **settings)
    for scale in (9, 0):
        with pytest.raises(ConfigError):
            graph.export_onnx("m.onnx", generator, scale=scale)
    with pytest.raises(ConfigError):  # scores of the frequency estimator are no part of a graph
        graph.export_onnx("m.onnx", generator, live=True)
    fix_routing(generator, image=lr)
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError):
        graph.export_onnx("m.onnx", generator)
    assert not Path("m.onnx").exists()
