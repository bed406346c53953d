"""A run as it stands: what its next step needs, and what is measured and saved of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import save_image
from tqdm.auto import tqdm

from unclip.data.order import Integers
from unclip.training import checkpoints
from unclip.training.batches import GlobalBatches
from unclip.training.checkpoints import Checkpointer, Trained
from unclip.training.ema import Average, WholeCopy, trained, whole
from unclip.training.guard import Guard
from unclip.training.noise import SampleGenerators, sample_seed
from unclip.training.objective import Objective
from unclip.training.parallel import agree, blocks, is_finite, on_main, recompute, share_buffers
from unclip.training.push import push_run
from unclip.training.recipe import FitConfig, learning_rate_factor
from unclip.training.tracking import Meter, Tracking
from unclip.training.validation import Validation


class Training:
    """What a step needs, from the run's newest checkpoint on.

    Attributes:
        step: optimizer steps that are done, those left out included.
    """

    held_out: Validation | None = None

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        dataset: Dataset[Any],
        config: FitConfig,
        run: Path,
        resolved: Mapping[str, Any],
    ) -> None:
        self.accelerator = accelerator
        self.objective = objective
        self.config = config
        self.run = run
        self.micro_batch_size = micro_batch_size_of(config, accelerator.num_processes)
        self.copy = WholeCopy(objective, wanted=accelerator.is_main_process)
        self.frozen = checkpoints.frozen_fingerprint(objective)
        self.module, self.optimizer = _prepare(objective, config, accelerator)
        self.average = Average(objective, config.ema_decay)
        self.state = Trained(objective, self.optimizer.optimizer, self.average)
        self.meter, self.guard = Meter(), Guard(config.max_bad_steps)
        self.step = 0
        self._resume(checkpoints.resume(accelerator, run, self.state, self.frozen))
        self.batches = GlobalBatches(
            dataset,
            batch_size=config.batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            first_batch=self.step,
            seed=config.seed,
        )
        self.tracking = Tracking(accelerator, run, config.tracker, resolved)
        self.checkpointer = Checkpointer(
            accelerator, run, config.keep_checkpoints, config.keep_every
        )
        self.clock, self.seen = time.perf_counter(), 0
        self.bar = tqdm(
            total=config.max_steps,
            initial=self.step,
            desc=objective.stage,
            unit="step",
            disable=not accelerator.is_main_process,
        )

    def _resume(self, progress: Mapping[str, Any]) -> None:
        if not progress:
            return
        self.step = progress["step"]
        self.average.steps = progress["averaged_steps"]
        self.guard.skipped, self.guard.in_a_row = progress["bad_steps"]
        if self.accelerator.is_main_process:  # the values of all processes
            self.meter.values.update(progress["meter"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(progress["scaler"])

    def __enter__(self) -> None:
        self.module.train()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.bar.close()
        self.checkpointer.close()
        self.accelerator.end_training()
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise OSError(
                f"a process that reads data died at step {self.step} ({str(error).split(': ')[0]}):"
                " if memory ran out, lower fit.num_workers; the same command goes on from the last "
                "checkpoint"
            ) from error

    def take_step(self, data: Iterator[dict[str, Any]]) -> None:
        """One optimizer step, or none where the loss or its gradient is not finite."""
        config, accelerator = self.config, self.accelerator
        learning_rate = config.learning_rate * learning_rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        done = []
        for positions in self.batches.positions(self.step):
            batch = _to_device(next(data), accelerator.device, config.channels_last)
            with accelerator.accumulate(self.module), accelerator.autocast():
                out = self.module(batch, self._randomness(positions))
                accelerator.backward(out["loss"])
            done.append((batch, {name: v.detach().float() for name, v in out.items()}))
        norm = accelerator.clip_grad_norm_(self.average.parameters.values(), config.max_grad_norm)
        norm = whole(norm)
        finite = is_finite(*(out["loss"] for _, out in done))
        # fp16's scaler looks for infinite gradients itself, and learns from them.
        finite = finite and (accelerator.scaler is not None or is_finite(norm))
        (bad,) = agree(accelerator, not finite)
        if bad:
            self.guard.skip(accelerator, self.step, done, norm)
        else:
            self.guard.passed()
            self.optimizer.step()
            if not self.optimizer.step_was_skipped:
                self.average.step()
            for _, out in done:
                self.meter.add(out)
            self.meter.add({"grad_norm": norm})
        self.optimizer.zero_grad()
        self.step += 1
        self.seen += config.batch_size
        self.bar.update()

    def _randomness(self, positions: Integers) -> SampleGenerators:
        """Of a micro-batch: noise by the sample, dropout by the micro-batch, both functions of the
        seed and of where in the sequence of samples they stand."""
        seed, device = self.config.seed, self.accelerator.device
        set_seed(sample_seed("dropout", seed, int(positions[0])))
        seeds = [sample_seed("noise", seed, position) for position in positions.tolist()]
        return SampleGenerators(seeds, device)

    def means(self) -> dict[str, float]:
        """What was measured since the last line."""
        now = time.perf_counter()
        metrics = self.meter.read() | {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": self.seen / (now - self.clock),
        }
        if self.guard.skipped:
            metrics["bad_steps"] = self.guard.skipped
        self.clock, self.seen = now, 0
        self.bar.set_postfix(
            loss=f"{metrics.get('loss', float('nan')):.4g}",
            pictures_s=f"{metrics['samples_per_second']:.0f}",
        )
        return metrics

    def validate(self) -> dict[str, float]:
        """The held-out loss of the averaged weights, and what else the objective measures."""
        assert self.held_out is not None
        to_device = partial(
            _to_device,
            device=self.accelerator.device,
            channels_last=self.config.channels_last,
        )
        share_buffers(self.accelerator, self.objective)
        with self.average.in_place():
            metrics = self.held_out.run(self.accelerator, self.module, to_device)
        more: dict[str, float] = {}
        with self._copy_on_device() as objective:
            on_main(self.accelerator, lambda: more.update(objective.metrics()))
        self.clock = time.perf_counter()
        return metrics | {f"val/{name}": value for name, value in more.items()}

    def preview(self) -> None:
        """Draw the sample grid from the averaged weights."""
        path = self.run / "samples" / f"step-{self.step:07d}.png"

        def draw_grid() -> None:
            with torch.no_grad():
                pictures = objective.preview()
            if pictures is None:
                return
            pictures = ((pictures.float().cpu() + 1) / 2).clamp(0, 1)
            path.parent.mkdir(exist_ok=True)
            save_image(pictures, path, nrow=max(1, round(len(pictures) ** 0.5)))
            self.tracking.log_images("samples", pictures, self.step)

        with self._copy_on_device() as objective:
            on_main(self.accelerator, draw_grid)
        self.clock = time.perf_counter()

    def log(self, metrics: Mapping[str, float]) -> None:
        """Write a line of `metrics.jsonl`."""
        samples = self.step * self.config.batch_size
        self.tracking.log({**metrics, "samples": samples}, self.step)

    def save(self) -> None:
        """Have a checkpoint and the stage's folder written while training goes on."""
        share_buffers(self.accelerator, self.objective)  # or a checkpoint has any process's
        self._take_copy()
        scaler = self.accelerator.scaler
        progress = {
            "step": self.step,
            "averaged_steps": self.average.steps,
            "bad_steps": [self.guard.skipped, self.guard.in_a_row],
            "meter": self.meter.gather(),
            "frozen": self.frozen,
            "num_processes": self.accelerator.num_processes,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        objective, folder, push = self.copy.module, self.run / self.objective.stage, None
        if self.config.push_to is not None:
            push = partial(push_run, self.run, self.objective.stage, self.config.push_to)
        self.checkpointer.save(self.state, progress, lambda: objective.export(folder), push)

    def _take_copy(self) -> None:
        on_main(self.accelerator, self.checkpointer.wait)  # what is being written is read from it
        self.copy.take(self.average, dict(self.objective.named_buffers()))

    @contextmanager
    def _copy_on_device(self) -> Iterator[Any]:
        self._take_copy()
        if self.copy.module is not None:
            self.copy.module.to(self.accelerator.device)
        yield self.copy.module
        if self.copy.module is not None:
            self.copy.module.cpu()


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(trained(module).values())
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def micro_batch_size_of(config: FitConfig, num_processes: int) -> int:
    shares = num_processes * config.gradient_accumulation_steps
    if config.batch_size % shares:
        near = max(1, round(config.batch_size / shares)) * shares
        raise ValueError(
            "fit.batch_size must be a multiple of processes x gradient_accumulation_steps = "
            f"{shares}; got {config.batch_size}: use {near}"
        )
    return config.batch_size // shares


def _prepare(
    objective: Objective, config: FitConfig, accelerator: Accelerator
) -> tuple[nn.Module, Any]:
    """The objective and its optimizer as Accelerate runs them."""
    objective.to(accelerator.device)
    for helper in objective.frozen:
        helper.to(accelerator.device)
    if config.channels_last:
        objective.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for block in blocks(objective.network):
        if config.activation_checkpointing:
            recompute(block)
        if config.compile:
            block.compile()
    for name, parameter in trained(objective).items():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"master weights must be fp32; got {parameter.dtype} for {name}: "
                "load the model in fp32 and set fit.mixed_precision"
            )
    optimizer = torch.optim.AdamW(
        _parameter_groups(objective, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_eps,
        fused=True,
    )
    return accelerator.prepare(objective, optimizer)


def _to_device(batch: dict[str, Any], device: torch.device, channels_last: bool) -> dict[str, Any]:
    moved = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
            if channels_last and value.ndim == 4:
                value = value.to(memory_format=torch.channels_last)
        moved[name] = value
    return moved
