"""What the tests of the training core share: random pairs, a small module, and how it is run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from morsr.adapters import MoRConfig
from morsr.models.draws import Draws
from morsr.models.generator import OneStepConfig
from morsr.models.losses import Distillation, Gan, Losses, Weight
from morsr.training.config_files import read_config
from morsr.training.module import OneStepSRModule
from morsr.training.step import OneStepPhase

ADAPTERS = MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=("sd_unet@unet", "tiny_vae_encoder@vae"))
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
ALL_LOSSES = {"l2": 1.0, "features": 0.5, "vsd": 1.0, "gan": 0.1}


class Pairs(L.LightningDataModule):
    """Random pairs that depend on their number alone."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.pair(index) for index in range(6)], batch_size=2, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.pair(index) for index in range(100, 102)], batch_size=1, collate_fn=self.collate)

    def pair(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        lr = torch.rand(3, 8, 8, generator=generator)
        hr = torch.rand(3, 32, 32, generator=generator)
        return {"lr": lr, "hr": hr, "stem": str(index)}

    def collate(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        stacked = {name: torch.stack([pair[name] for pair in pairs]) for name in ("lr", "hr")}
        return {**stacked, "stem": [pair["stem"] for pair in pairs]}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


def build(base: Path, kind: type[OneStepSRModule] = OneStepSRModule, **settings: Any) -> OneStepSRModule:
    """A seeded module on a small base."""
    torch.manual_seed(0)
    terms, kinds = settings.pop("loss", {}), {"vsd": Distillation, "csd": Distillation, "gan": Gan}
    given = {name: value if isinstance(value, dict) else {"weight": value} for name, value in terms.items()}
    losses = {name: kinds.get(name, Weight)(**value) for name, value in given.items()}
    settings.setdefault("losses", Losses(**losses))
    module = kind(
        **{
            "base": str(base),
            "adapters": ADAPTERS,
            "one_step": OneStepConfig(timestep=150, scale_input=True),
            "lr": 1e-2,
            "calibration_images": 8,
            **settings,
        }
    )
    module.configure_model()
    return module


def fit(
    module: OneStepSRModule,
    folder: Path,
    steps: int,
    *,
    ckpt: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    save_at: int = 0,
    data: L.LightningDataModule | None = None,
    **settings: Any,
) -> L.Trainer:
    """Train for so many steps on the CPU, without validation; save_at: steps from one at-{step}.ckpt to the next."""
    if save_at:
        keep = ModelCheckpoint(dirpath=folder, filename="at-{step}", every_n_train_steps=save_at, save_top_k=-1)
        callbacks = [*callbacks, keep]
    trainer = L.Trainer(
        **{
            "max_steps": steps, "accelerator": "cpu", "logger": False, "default_root_dir": folder,
            "callbacks": list(callbacks), "enable_checkpointing": bool(callbacks), "enable_progress_bar": False,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, **settings,
        }
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, datamodule=data or Pairs(), ckpt_path=ckpt)
    return trainer


def run_options(config: str, base: Path | str, samples: int | None = None, **trainer: Any) -> list[str]:
    """`morsr fit` with a config on dead leaves and the small base, one small crop a step, all losses from the first.

    It is one text, which is parsed once; every override on a command line costs another pass.
    """
    settings = read_config(EXPERIMENTS / config)
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    model |= {"base": str(base), "calibration_images": 2, "warmup": 0}
    model["adapters"]["targets"] = ["sd_unet@unet"]
    for name in {"vsd", "gan"} & set(model["losses"]):
        model["losses"][name] |= {"start": 0, "ramp": 0}
    data |= {"train": [], "val": [], "test": [], "dead_leaves": 1.0, "batch_size": 1, "crop_size": 32, "num_workers": 0}
    data["samples_per_epoch"] = samples
    settings["trainer"] |= {"accelerator": "cpu", "limit_val_batches": 0, "val_check_interval": None}
    settings["trainer"] |= {"enable_progress_bar": False, **trainer}
    return ["fit", "--config", yaml.safe_dump(settings)]


def batch(count: int = 2) -> dict[str, Any]:
    """A batch of random pairs."""
    pairs = Pairs()
    return pairs.collate([pairs.pair(index) for index in range(count)])


def draws(count: int = 2, *, step: int = 0, first: int = 0) -> Draws:
    """Random numbers of a step."""
    return Draws.of_step(seed=0, step=step, first=first, count=count, device=torch.device("cpu"))


def plain_phase(module: OneStepSRModule, **settings: Any) -> OneStepPhase:
    """The module's iteration with plain PyTorch, without a trainer."""

    def backward(loss: Tensor, average: bool) -> None:
        loss.backward()

    module.train()
    return OneStepPhase(
        module.objective, module.build_networks(), backward=backward, update=lambda n: n.optimizer.step(), **settings
    )
