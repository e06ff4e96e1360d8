"""No damaged picture is taken for a whole one, no rare decoder is within reach, no checkpoint runs code."""

import ast
import contextlib
import io
import random
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from restorer_twins import photo

from morsr import Restorer
from morsr.adapters import save_adapters
from morsr.cli import main
from morsr.errors import InputError, WeightsError
from morsr.evaluation.images import read_rgb
from morsr.imaging import read_rgb as read_for_training


@pytest.fixture(scope="module")
def readers():
    """Every way a picture comes in."""
    restorer = Restorer.from_pretrained("tiny", device="cpu")
    return {
        "restorer, path": restorer,
        "restorer, PIL": lambda path: restorer(Image.open(path)),
        "training": read_for_training,
        "score": read_rgb,
    }


def smooth_png(mode: str = "RGB") -> bytes:
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([2 * x, 3 * y, x + y], axis=-1).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_flipped_bit_of_a_png_is_refused(mode, readers, tmp_path):
    whole, draw, path = smooth_png(mode), random.Random(mode), tmp_path / "damaged.png"
    first, last = whole.index(b"IDAT"), whole.index(b"IEND")
    for place in [*(draw.randrange(len(whole)) for _ in range(10)), *(draw.randrange(first, last) for _ in range(15))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        for name, read in readers.items():
            with contextlib.suppress(InputError, OSError):
                read(path)
                pytest.fail(f"{name} took a PNG with a flipped bit in byte {place}")


def test_every_open_names_its_formats(repo_root):
    """Pillow has parsers for dozens of formats, some of them old and little tested."""
    bare = []
    for folder in ("src", "benchmarks", "data_prep", "experiments"):
        for path in (repo_root / folder).rglob("*.py"):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if "Image.open" in text else ():
                opens = isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
                if opens and all(keyword.arg != "formats" for keyword in node.keywords):
                    bare.append(f"{path.relative_to(repo_root)}:{node.lineno}")
    assert not bare


class Payload:
    """Makes an unpickler that runs code leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def served(tmp_path):
    """A folder, and the address under which a web server gives it out."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("command", "remote"), [("fit", True), ("fit", False), ("test", False)])
def test_no_checkpoint_runs_code(command, remote, served, small_base, repo_root, tmp_path, capsys):
    folder, address = served
    name, ran = f"{command}-{remote}.ckpt", tmp_path / "ran"
    torch.save({"state_dict": {}, "morsr": Payload(ran)}, folder / name)
    photos = tmp_path / "photos"
    for index in range(2):
        photo(photos / f"{index}.png", (96, 96))
    source = f"{address}/{name}" if remote else folder / name
    status = main([
        command, "--config", str(repo_root / "experiments" / "tiny/mor.yaml"), "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=1", f"--data.train=[{photos}]",
        f"--data.val=[{photos}]", "--data.crop_size=32", "--data.num_workers=0", "--data.val_multiple=16",
        f"--data.predict=[{photos}]", f"--model.base={small_base}",
        "--model.calibration_images=2", "--model.adapters.targets=[sd_unet@unet]", "--model.losses={l2: {weight: 1.0}}",
        f"--ckpt_path={source}",
    ])  # fmt: skip
    assert not ran.exists()
    assert status == 2
    assert name in capsys.readouterr().err


def test_no_adapters_file_names_a_class_to_import():
    Path("evil.py").write_text("open('ran', 'w')")
    model = Restorer.from_pretrained("tiny", device="cpu").generator
    described = {"estimator": "evil.Thing", "one_step": model.one_step.to_dict(), "base": "tiny"}
    save_adapters("a.safetensors", model.base, extra=described)
    with pytest.raises(WeightsError):
        Restorer.from_pretrained("a.safetensors", device="cpu")
    assert not Path("ran").exists()
