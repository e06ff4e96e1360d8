"""The LightningModule of one-step super-resolution with a mixture of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from morsr.adapters import (
    MoRConfig,
    Router,
    load_adapters,
    read_adapters_header,
    save_adapters,
)
from morsr.adapters.files import prints_of_layers, start_from_adapters
from morsr.adapters.inject import add_saved_modules
from morsr.errors import ConfigError, WeightsError
from morsr.estimators import DegradationEstimator, build_estimator
from morsr.functional.quality import quantize_8bit
from morsr.models.bases import SHIPPED_BASES, Base, load_base
from morsr.models.draws import Draws
from morsr.models.generator import GeneratorOutput, OneStepConfig, OneStepGenerator
from morsr.models.loading import find_adapters
from morsr.models.losses import Losses, build_lpips
from morsr.models.scores import ScoreMeans
from morsr.training.adapter_state import (
    check_optimizers,
    check_settings,
    check_tensors,
    runs_otherwise,
    saved_tensors,
)
from morsr.training.calibration import find_timestep, standardize_router
from morsr.training.objective import Objective
from morsr.training.optim import (
    ScheduleName,
    build_networks,
    check_trainer,
    check_turns,
    total_steps,
)
from morsr.training.step import Network, OneStepPhase


class OneStepSRModule(L.LightningModule):
    r"""Trains the adapters of a one-step generator on pairs of low- and high-resolution images.

    Only the adapters and their router are trained and saved, with the score network's adapters and the discriminator's
    heads where the losses ask for them; the base model is named in the checkpoint and read from where it came from.
    Steps are counted by the generator's: so do max_steps, checkpoints, loggers and every schedule.

    Args:
        base: a preset ("tiny", "sd21", "sd-turbo"), a local diffusers folder, a hub id, a list of ids, or a `Base`.
        prompts, base_dtype: see `load_base`: texts instead of the fixed prompts, and what the frozen weights are
            stored as.
        checkpointing: recompute activations in the backward pass, which saves memory and costs time.
        adapters: ranks, experts, router and balance of the mixture.
        router: class of the router, made from (config, layers, scores); default `morsr.adapters.Router`.
        estimator: "frequency", "learned", "clip", or a class path such as mine.Mine with its init_args.
        estimator_args: settings of an estimator that is given by its short name.
        one_step: timestep and parametrization of the network's call.
        losses: the terms with their weights and settings; terms of your own under ``extra``.
        weights: adapters (file, folder or preset) to start from, to validate or to test. None: `fit` starts afresh;
            the others take what the module was fitted to, else the newest run's adapters, else the shipped.
        start_from: adapters file that `fit` alone starts from; a plain LoRA becomes the first shared ranks.
        lr, router_lr_scale, saved_lr_scale, weight_decay, betas, warmup, schedule: see `build_networks`.
        optimizers: by network ("generator", "score", "discriminator"), instead of AdamW; called with its groups.
        scheduler: instead of `schedule`; called with each optimizer, stepped once per step of its network.
        clip: largest norm of each network's gradient; 0 for none. It stands in for the trainer's gradient_clip_val.
        accumulate: parts that each batch is split into to save memory; stands in for accumulate_grad_batches.
        max_skipped: steps in a row whose gradient is not finite before the run stops; each of them is left out.
        calibration_images: degraded images, two at least, whose mean and deviation standardise what the router sees;
            the first 256 of them are what ``timestep: auto`` is found over.
        seed: of the noise of losses and router.
        val_metrics: what validation logs, by the names of `morsr score`.

    Raises:
        ConfigError: weights and start_from at once, modules_to_save of a base in 16 bits, or an unknown metric.
    """

    generator: OneStepGenerator
    objective: Objective

    def __init__(
        self,
        *,
        base: Base | list[str] | str = "tiny",
        prompts: dict[str, str] | None = None,
        base_dtype: str | None = None,
        checkpointing: bool = False,
        adapters: MoRConfig | None = None,
        router: Callable[[MoRConfig, int, int], Router] = Router,
        estimator: DegradationEstimator | str = "frequency",
        estimator_args: dict[str, Any] | None = None,
        one_step: OneStepConfig | None = None,
        losses: Losses | None = None,
        weights: str | None = None,
        start_from: str | None = None,
        lr: PositiveFloat = 5e-5,
        router_lr_scale: PositiveFloat = 20.0,
        saved_lr_scale: PositiveFloat = 0.2,
        weight_decay: NonNegativeFloat = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: NonNegativeInt = 0,
        schedule: ScheduleName = "constant",
        optimizers: dict[str, OptimizerCallable] | None = None,
        scheduler: LRSchedulerCallable | None = None,
        clip: NonNegativeFloat = 1.0,
        accumulate: PositiveInt = 1,
        max_skipped: PositiveInt = 10,
        calibration_images: PositiveInt = 1024,
        seed: int = 0,
        val_metrics: Sequence[str] = ("psnr", "ssim", "niqe"),
    ) -> None:
        super().__init__()
        if weights is not None and start_from is not None:
            raise ConfigError("weights and start_from both name adapters to start from; give one of them")
        if adapters is not None and adapters.modules_to_save and base_dtype not in (None, "float32"):
            raise ConfigError(
                f"base_dtype: expected float32 with modules_to_save, got {base_dtype}, in whose precision a small step "
                "moves hardly any weight"
            )
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold the adapters alone; `on_load_checkpoint` checks them
        self.adapters, self.one_step = adapters or MoRConfig(), one_step or OneStepConfig()
        # Kept in dictionaries, where networks that were given are no part of the module before it is built.
        self.base_settings: dict[str, Any] = {"prompts": prompts, "dtype": base_dtype}
        self.prompts = prompts or None  # or the texts that adapters bring along
        self.parts: dict[str, Any] = {
            "base": base, "estimator": estimator, "estimator_args": estimator_args or {}, "router": router,
            "losses": losses, "checkpointing": checkpointing,
        }  # fmt: skip
        self.optimizers_by_network, self.scheduler_factory = dict(optimizers or {}), scheduler
        self.optimizer_settings: dict[str, Any] = {
            "lr": lr, "router_lr_scale": router_lr_scale, "saved_lr_scale": saved_lr_scale,
            "weight_decay": weight_decay, "betas": betas, "warmup": warmup, "schedule": schedule,
        }  # fmt: skip
        self.step_settings: dict[str, Any] = {"clip": clip, "accumulate": accumulate, "max_skipped": max_skipped}
        self.calibration_images, self.seed = max(calibration_images, 2), seed
        self.weights_file, self.start_from = weights, start_from
        self.scores = ScoreMeans(val_metrics)
        self.last_outputs: list[GeneratorOutput] = []
        self.phase: OneStepPhase | None = None
        self._restored: Mapping[str, Any] | None = None  # what the checkpoint says of itself
        self._fitted = False

    def configure_model(self) -> None:
        """Read base and estimator, inject the adapters and build the losses, unless that has been done.

        Lightning calls it after all checks of the trainer; without a trainer, the first look at the generator does.

        Raises:
            ConfigError: settings that do not go together.
            WeightsError: base or adapters that cannot be read.
        """
        if "generator" in self._modules:
            return
        parts = self.parts
        # On the CPU, where the start is the same for every device; the strategy moves the module later.
        with torch.device("cpu"):
            # The base last, which takes longest: what else is missing is said before it is read.
            estimator, losses = build_estimator(parts["estimator"], **parts["estimator_args"]), parts["losses"]
            if lost := estimator.unsaved():
                rank_zero_warn(f"no file will hold the estimator's {', '.join(lost)}: override its settings()")
            lpips = build_lpips() if losses and losses.lpips else None
            base = load_base(parts["base"], **self.base_settings)
            generator = OneStepGenerator(
                base, estimator, adapters=self.adapters, router=parts["router"], one_step=self.one_step,
                checkpointing=parts["checkpointing"],
            )  # fmt: skip
            self.objective = Objective(generator, losses, lpips=lpips)
        # Registered here, so that they move with the module and are saved with it.
        self.generator = generator
        self.lpips, self.discriminator = self.objective.lpips, self.objective.discriminator
        self.extra_losses = nn.ModuleDict(self.objective.extra)
        if self.weights_file is not None:
            self.load_adapters(self.weights_file)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules")
        if name in ("generator", "objective") and modules is not None and "generator" not in modules:
            self.configure_model()
            return getattr(self, name)
        return super().__getattr__(name)

    def forward(self, lr: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Restore LR images (B, 3, h, w) in [0, 1]; the result is clamped to [0, 1]."""
        return self.generator(lr, size=size).sr.clamp(0, 1)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        assert self.phase is not None
        count, step, rank = len(batch["hr"]), self.global_step, self.trainer.global_rank
        if (adapters := self.generator.adapters) is not None:
            total = total_steps(self.trainer)
            adapters.router.noise_sigma = self.adapters.noise_at(step / total if total > 0 else 1.0)
        draws = Draws.of_step(seed=self.seed, step=step, first=rank * count, count=count, device=self.device)
        report = self.phase.run(batch, draws, step=step)
        self.last_outputs = report.outputs
        values = report.values(self.global_step)
        self.log("train/loss", values.pop("train/loss"), prog_bar=True, batch_size=count)
        self.log_dict(values, batch_size=count)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        sr = quantize_8bit(self(batch["lr"], size=tuple(batch["hr"].shape[-2:])))  # as a saved file has it
        self.scores.update(sr, batch["hr"], batch.get("repeated"))
        return {"sr": sr}

    def on_validation_epoch_end(self) -> None:
        if not self.scores.rows:  # a process whose images others count: gathering wants its columns
            self.scores.rows.append(torch.empty(0, len(self.scores.metrics), device=self.device))
        self.log_dict({f"val/{name}": mean for name, mean in self.scores.compute().items()}, prog_bar=True)
        self.log("step", float(self.global_step))  # not Lightning's count of batches
        self.scores.reset()

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Nothing here: `BenchmarkTable` collects the pairs and runs every row of the table alike."""

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        scale = getattr(self.trainer.datamodule, "scale", self.generator.one_step.scale)
        return {"sr": self.generator(batch["lr"], scale=scale).sr.clamp(0, 1), "stem": batch.get("stem")}

    def build_networks(self, total_steps: int = -1) -> list[Network]:
        """Generator, and score network and discriminator where there are any, each with its optimizer."""
        return build_networks(
            self.objective, total_steps=total_steps, optimizers=self.optimizers_by_network,
            scheduler=self.scheduler_factory, **self.optimizer_settings,
        )  # fmt: skip

    def configure_optimizers(self) -> Any:
        networks = self.build_networks(total_steps(self.trainer))
        check_turns(self.trainer, networks=len(networks))
        self.phase = OneStepPhase(
            self.objective, networks, backward=self._backward, update=self._update, **self.step_settings
        )
        schedulers = [{"scheduler": n.scheduler, "interval": "step", "name": f"watch/lr_{n.name}"} for n in networks]
        return [network.optimizer for network in networks], schedulers

    def _backward(self, loss: Tensor, average: bool) -> None:
        block = None if average else getattr(self.trainer.strategy, "block_backward_sync", None)
        with block() if block is not None else nullcontext():
            self.manual_backward(loss)

    def _update(self, network: Network) -> None:
        optimizers = self.optimizers()
        if network.name == "generator":
            (optimizers[0] if isinstance(optimizers, list) else optimizers).step()
        else:
            # Past Lightning's wrapper, which would count this as a step of the run.
            self.trainer.strategy.optimizer_step(network.optimizer, lambda: None)

    def setup(self, stage: str) -> None:
        self._restored = None
        if stage == "fit":
            check_trainer(self.trainer)

    # What a checkpoint does not hold is read after Lightning has restored it, which is between `setup` and these hooks.

    def on_fit_start(self) -> None:
        if self._restored is not None:
            check_optimizers(self._restored.get("optimizer", {}), self._rates())
        elif self.start_from is not None:
            file = find_adapters(self.start_from)
            header = read_adapters_header(file)
            rank_zero_info(start_from_adapters(file, self.generator.base, self.parts["router"]))
            self._take(header["extra"], header["attached"])
            if other := runs_otherwise(header["extra"], self.generator):
                rank_zero_warn(f"{file} was trained to run with {other}; here it starts elsewhere")
        if self.generator.adapters is not None:
            self.generator.adapters.router.train()  # Lightning keeps modes as they are
            if self.adapters.is_routed and self.adapters.noise_at(0.0) > 0 and total_steps(self.trainer) < 1:
                rank_zero_warn("the router's noise falls over a share of the run, whose length is not known: it is off")
        scale = getattr(self.trainer.datamodule, "scale", self.generator.one_step.scale)
        self.generator.one_step = replace(self.generator.one_step, scale=scale)
        find_timestep(self.trainer, self.generator, pairs=min(256, self.calibration_images))
        standardize_router(self.trainer, self.generator, images=self.calibration_images)
        self._fitted = True

    def _take(self, extra: Mapping[str, Any], embeddings: Mapping[str, Tensor]) -> None:
        """Run at the timestep and with the prompts that adapters were trained with, unless the config gave some."""
        if self.generator.one_step.timestep == "auto" and "timestep" in (found := extra.get("one_step") or {}):
            self.generator.one_step = replace(self.generator.one_step, timestep=found["timestep"])
        if embeddings and not self.base_settings["prompts"]:  # old files have none
            texts = {"clean": extra["prompt"]} if extra.get("prompt") is not None else None  # of a saved folder
            self.prompts = extra.get("prompts") or texts
            self.generator.base.set_prompts(embeddings)
            self.generator.base.prompt = (self.prompts or {}).get("clean")

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._find_weights()

    def on_test_start(self) -> None:
        self._find_weights()

    on_predict_start = on_test_start

    @torch.inference_mode(mode=False)
    def _find_weights(self) -> None:
        if self.weights_file is not None or self._restored is not None or self._fitted:
            return
        runs = Path(self.trainer.log_dir or self.trainer.default_root_dir).absolute().parent
        files = sorted(runs.glob("*/adapters.safetensors"), key=lambda path: path.stat().st_mtime)
        preset = self.generator.base.base_id.removeprefix("morsr/")
        path = files[-1] if files else find_adapters(preset) if preset in SHIPPED_BASES else None
        if path is None:
            raise WeightsError(
                f"no adapters were given, none for the base {self.parts['base']!r} are shipped, and no run beside this "
                "one left any; train it first, or name some by model.weights"
            )
        rank_zero_info(f"adapters: {path} (model.weights names others)")
        self.load_adapters(path)

    def averaged_parameters(self) -> dict[str, nn.Parameter]:
        """What `AdapterEMA` averages: the generator's own adapters."""
        mine = {id(parameter) for parameter in self.objective.trained()["generator"]}
        return {name: value for name, value in self.generator.named_parameters() if id(value) in mine}

    def save_adapters(self, path: str | os.PathLike[str]) -> None:
        """Write the generator's adapters, their router and how to run them on the same base, atomically."""
        base = self.generator.base
        save_adapters(path, base, base_id=base.base_id, extra=self._recipe(), attached=base.prompts)

    def _recipe(self) -> dict[str, Any]:
        """What a file of adapters needs beside them to be run again."""
        estimator, base, adapters = self.generator.estimator, self.parts["base"], self.generator.adapters
        router = adapters.router.class_path if adapters is not None else None
        return {
            "estimator": None if estimator is None else estimator.spec,
            "one_step": self.generator.one_step.to_dict(),
            "base": (self.generator.base.source or self.generator.base.base_id) if isinstance(base, Base) else base,
            **({"router": router} if router else {}),
            **({"prompts": self.prompts} if self.prompts else {}),
        }

    def load_adapters(self, path: str | os.PathLike[str]) -> None:
        """Load adapters of the same configuration, a file, its folder or a shipped preset, over the ones in the module.

        The prompts that they were trained with come along, unless the module was given its own.

        Raises:
            WeightsError: another base, configuration, timestep or estimator, or a damaged file; nothing
                is changed then.
        """
        file, base = find_adapters(path), self.generator.base
        header = read_adapters_header(file)
        if other := runs_otherwise(header["extra"], self.generator):
            raise WeightsError(
                f"{file}: trained to run with {other}; take the config that it was trained by, or set model.one_step "
                "and model.estimator to what it needs"
            )
        self.adapters = load_adapters(file, base, name="generator", router=self.parts["router"]).config
        self._take(header["extra"], header["attached"])

    def _rates(self) -> dict[str, Any]:
        """Optimizers of all networks and their settings by their names in the config, which a checkpoint records."""
        helpers = {f"{name}.lr": helper.lr for name, helper in self.objective.helpers.items() if helper.lr is not None}
        networks = self.phase.networks if self.phase is not None else ()
        kinds = {f"optimizers.{one.name}": type(one.optimizer).__name__ for one in networks}
        kinds |= {f"schedulers.{one.name}": type(one.scheduler).__name__ for one in networks}
        return {**self.optimizer_settings, **helpers, **kinds}

    def _saved_tensors(self) -> dict[str, Tensor]:
        trained = [parameter for network in self.objective.trained().values() for parameter in network]
        helpers = [one for one in (self.discriminator, self.extra_losses) if one is not None]
        return saved_tensors(self, [*trained, *(one for helper in helpers for one in helper.buffers())], self.generator)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep = self._saved_tensors()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in keep}
        base, adapters = self.generator.base, self.generator.adapters
        checkpoint["morsr"] = {
            "base_id": base.base_id,
            "layers": prints_of_layers(adapters) if adapters is not None else [],
            "saved": list(adapters.copies) if adapters is not None else [],
            "adapters": self.adapters.to_dict(),
            "extra": self._recipe(),
            "optimizer": self._rates(),
            "prompts": base.prompts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        described = checkpoint.get("morsr", {})
        check_settings(described, self.generator)
        if self.generator.adapters is not None:
            add_saved_modules(self.generator.base, self.generator.adapters, described.get("saved", ()))
        check_tensors(checkpoint["state_dict"], self._saved_tensors())
        self._take(described.get("extra", {}), described.get("prompts", {}))
        self._restored = described
