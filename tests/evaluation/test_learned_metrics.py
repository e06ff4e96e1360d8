"""Learned metrics through the real loading code of pyiqa, with small files of made-up weights in its cache."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from morsr.errors import WeightsError
from morsr.evaluation import scoring
from morsr.evaluation.scoring import score_folders
from morsr.functional.quality import frechet_distance
from morsr.models import metrics
from morsr.models.metrics import METRICS, build_metric

pytest.importorskip("pyiqa")

# Our name: the class of pyiqa, the module of its architecture, and the files that it loads.
EXPECTED: dict[str, tuple[str, str, set[str]]] = {
    "lpips": ("LPIPS", "lpips_arch", {"LPIPS_v0.1_alex-df73285e.pth", "alexnet-owt-7be5be79.pth"}),
    "lpips-vgg": ("LPIPS", "lpips_arch", {"LPIPS_v0.1_vgg-a78928a0.pth", "vgg16-397923af.pth"}),
    "dists": ("DISTS", "dists_arch", {"DISTS_weights-f5e65c96.pth", "vgg16-397923af.pth"}),
    "musiq": ("MUSIQ", "musiq_arch", {"musiq_koniq_ckpt-e95806b9.pth"}),
    "maniqa": ("MANIQA", "maniqa_arch", {"ckpt_koniq10k.pt"}),
    "maniqa-pipal": ("MANIQA", "maniqa_arch", {"MANIQA_PIPAL-ae6d356b.pth"}),
    "clipiqa": ("CLIPIQA", "clip_model", {"RN50.pt"}),
    "topiq": ("CFANet", "topiq_arch", {"cfanet_nr_koniq_res50-9a73138b.pth"}),
    "tres": ("TReS", "tres_arch", {"tres_koniq-f0502926.pth"}),
    "fid": ("InceptionV3", "inception", {"pt_inception-2015-12-05-6726825d.pth"}),
}
TORCHVISION = {"alexnet-owt-7be5be79.pth": "alexnet", "vgg16-397923af.pth": "vgg16"}


def made_up(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Values of the same shapes whose last axis alone varies, so that a file of a hundred million of them is small."""
    generator = torch.Generator().manual_seed(seed)

    def value(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        last = torch.rand(tensor.shape[-1:], generator=generator)
        return (last * 0.1).expand(tensor.shape)

    return {name: value(tensor) for name, tensor in state.items()}


def nested(state: dict[str, Tensor]) -> torch.nn.Module:
    """Modules that hold these tensors under their dotted names."""
    root = torch.nn.Module()
    for name, value in state.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(last, value)
    return root


def write(path: Path, state: dict[str, Tensor], *, key: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = made_up(state, seed=len(path.name) + sum(map(ord, path.name)))
    torch.save({key: values} if key else values, path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, and no way to the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub"
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(folder / "pyiqa"))

    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"download of {arguments[0]}")

    monkeypatch.setattr("pyiqa.utils.download_util.download_url_to_file", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return folder


def fill(name: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pyiqa say which files it would load for a metric and with which tensors, and write such files."""
    import torchvision
    from pyiqa.models.inference_model import InferenceModel

    _, architecture, files = EXPECTED[name]
    for file in files & TORCHVISION.keys():
        with torch.device("meta"):
            backbone = getattr(torchvision.models, TORCHVISION[file])()
        write(hub / "checkpoints" / file, backbone.state_dict())
    module = importlib.import_module(f"pyiqa.archs.{architecture}")
    if name == "clipiqa":
        with torch.device("meta"):
            clip = module.CLIP(1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12)
        place = hub / "clip" / "RN50.pt"
        place.parent.mkdir(parents=True)
        torch.jit.script(nested(made_up(clip.state_dict(), 0))).save(str(place))
        # The real file is known by its hash, which made-up weights cannot have.
        monkeypatch.setattr(module, "_download", lambda url, root: str(Path(root) / Path(url).name))
        return

    def record(network: Any, url: str, strict: bool = True, weight_keys: str | None = None) -> None:
        state = network.state_dict()
        if not strict:  # LPIPS and DISTS: what the file of torchvision does not hold
            state = {key: value for key, value in state.items() if re.match(r"lin\d|alpha|beta", key)}
        write(hub / "pyiqa" / Path(url).name, state, key=weight_keys)

    with monkeypatch.context() as patch, metrics._without_backbone_weights():
        patch.setattr(module, "load_pretrained_network", record)
        module.InceptionV3() if name == "fid" else InferenceModel(METRICS[name].pyiqa, device=torch.device("cpu"))


def inside(metric: metrics.Metric) -> Any:
    """The network in a metric."""
    cells = [cell.cell_contents for cell in metric.function.__closure__ or ()]
    network = next(cell for cell in cells if isinstance(cell, torch.nn.Module))
    return getattr(network, "net", network)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_each_name_is_the_right_network_from_the_files_it_lists(name: str, hub: Path, monkeypatch: pytest.MonkeyPatch):
    class_name, _, files = EXPECTED[name]
    with pytest.raises(WeightsError) as error:
        build_metric(name, download=False)
    assert all(str(weight.path(hub)) in str(error.value) for weight in METRICS[name].weights)
    fill(name, hub, monkeypatch)
    assert {str(path.relative_to(hub)) for path in hub.rglob("*.p*t*") if path.is_file()} == {
        weight.cached for weight in METRICS[name].weights
    }
    assert {Path(weight.cached).name for weight in METRICS[name].weights} == files
    network = inside(build_metric(name, download=False))
    assert type(network).__name__ == class_name
    own = list((network.clip_model[0] if name == "clipiqa" else network).state_dict().values())
    for path in hub.rglob("*.p*t*"):
        state = torch.jit.load(path).state_dict() if name == "clipiqa" else torch.load(path, weights_only=True)
        state = state.get("params", state)
        # Names differ where a backbone is cut into slices, so the first weights are looked up by their values, in half
        # precision, which is what CLIP keeps.
        for value in [value.half() for value in state.values() if value.ndim][:3]:
            assert any(torch.equal(value, other.half()) for other in own if other.shape == value.shape), path.name


@pytest.mark.slow
def test_lpips_and_musiq_score_as_pyiqa_itself(hub: Path, monkeypatch: pytest.MonkeyPatch):
    import pyiqa

    sr, hr = torch.rand(2, 1, 3, 48, 56)
    for name in ("lpips", "musiq"):
        fill(name, hub, monkeypatch)
        expected = pyiqa.create_metric(METRICS[name].pyiqa, device=torch.device("cpu"))(sr, hr)
        torch.testing.assert_close(build_metric(name, download=False)(sr, hr), expected.reshape(1).double())


@pytest.mark.slow
def test_fid_of_folders_as_pyiqa_itself(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from pyiqa.archs import inception
    from pyiqa.archs.fid_arch import get_folder_features

    def random_weights(network: Any, url: str) -> None:
        for parameter in network.parameters():  # zero-mean rows would die out within a few layers
            torch.nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else None
        path = hub / "pyiqa" / Path(url).name
        path.parent.mkdir(parents=True)
        torch.save(network.state_dict(), path)

    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_pretrained_network", random_weights)
        inception.InceptionV3()
    for folder, noise in (("sr", 30), ("gt", 0)):
        (tmp_path / folder).mkdir()
        for seed in range(4):
            generator = np.random.default_rng(seed)
            coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            image = np.asarray(Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC)).astype(float)
            image = np.clip(image + generator.normal(0, noise, image.shape), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / folder / f"{seed}.png")
    folders = {name: tmp_path / name for name in ("sr", "gt")}
    network = inception.InceptionV3().eval()
    theirs = [
        torch.from_numpy(get_folder_features(folder, network, num_workers=0, device=torch.device("cpu"), verbose=False))
        for folder in folders.values()
    ]
    expected = frechet_distance(*theirs).item()
    assert expected > 1e-3
    # Left at once and taken up again: the features come from the journal then.
    for _ in range(2):
        report = score_folders({"sr": folders["sr"]}, folders["gt"], metrics=["fid"], progress=False, download=False,
                               out=tmp_path / "out")  # fmt: skip
        assert report.mean("sr", "fid") == pytest.approx(expected, rel=1e-4)
        monkeypatch.setattr(scoring, "_score_job", None)


def test_pickled_code_in_a_file_of_weights_does_not_run(hub: Path, tmp_path: Path):
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    place = METRICS["musiq"].weights[0].path(hub)
    place.parent.mkdir(parents=True)
    torch.save({"weight": Harmful()}, place)
    with pytest.raises(WeightsError, match="musiq could not be loaded"):
        build_metric("musiq", download=False)
    assert not (tmp_path / "ran").exists()
