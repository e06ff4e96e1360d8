"""What every test shares: no network, one thread, fixed seeds, an empty working folder, the optional data folder."""

import gc
import os
import random
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

# Set before torch or a hub client is imported, and inherited by the processes that tests start. The networks here are
# so small that a second thread costs more than it gives; pytest-xdist uses the cores instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(REPO / "src"), *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(path))]
)
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile(
    "morsr",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("morsr")


def pytest_collection_finish():
    """Spare the garbage collector the half a million objects of the imports, which stay to the end."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _reproducible(tmp_path, tmp_path_factory, monkeypatch):
    """Seed every generator and work in an empty folder, so that no test depends on another or litters the checkout.

    The cache of weights is the session's: weights that a user has are not found.
    """
    import torch  # here, since the process that hands out the tests needs none

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # commands append the working folder
    sys.modules.pop("mine", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch"))


@pytest.fixture(scope="session")
def repo_root():
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data():
    """The folder with photographs that are not part of the project: MORSR_SHARED_DATA, else ../shared/data."""
    named = os.environ.get("MORSR_SHARED_DATA")
    folder = Path(named) if named else REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder, and {folder} is none; name it with MORSR_SHARED_DATA")
    return folder.resolve()


@pytest.fixture
def restorer():
    """A restorer over a real generator with random weights and adapters."""
    import restorer_twins

    from morsr import Restorer

    return Restorer(restorer_twins.small_generator(), device="cpu")


@pytest.fixture(scope="session")
def small_base(tmp_path_factory):
    """A base model of the real classes with two small blocks and random weights, saved as a diffusers folder."""
    import torch

    from morsr.models.bases import build_base

    torch.manual_seed(0)
    unet = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 8], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "UpBlock2D"], "cross_attention_dim": 8, "attention_head_dim": 4,
        "norm_num_groups": 4, "use_linear_projection": True,
    }  # fmt: skip
    vae = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "upsampling_scaling_factor": 2,
        "encoder_block_out_channels": [8, 8, 8], "decoder_block_out_channels": [8, 8, 8],
        "num_encoder_blocks": [0, 1, 1], "num_decoder_blocks": [1, 1, 0],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("bases") / "small"
    build_base(unet, vae, base_id="morsr/test").save(folder)
    return folder
