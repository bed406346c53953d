"""`fit`: the one training loop. What differs between stages is the objective it is given."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import save_image
from tqdm.auto import tqdm

from unclip.data.order import Integers
from unclip.training import checkpoints
from unclip.training.batches import GlobalBatches, loader
from unclip.training.checkpoints import Checkpointer, Trained
from unclip.training.ema import Average, WholeCopy, trained, whole
from unclip.training.guard import Guard
from unclip.training.noise import SampleGenerators, draw, sample_seed
from unclip.training.parallel import agree, blocks, is_finite, make_accelerator, on_main, recompute
from unclip.training.push import push_run
from unclip.training.signals import EXIT_STOPPED, stop_requests
from unclip.training.tracking import Meter, TrackerName, Tracking, offline_without_an_account
from unclip.training.validation import Validation

log = logging.getLogger(__name__)

__all__ = ["FitConfig", "Objective", "draw", "fit", "learning_rate_factor"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long, how fast, how often."""

    max_steps: int = 1000
    """Optimizer steps in all; a resumed run goes on to this number."""
    batch_size: int = 64
    """Samples an optimizer step, over all processes and accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches an optimizer step."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """After warm-up: hold, or fall to `lr_floor` by `max_steps` along a half cosine."""
    lr_floor: float = 0.0
    """Where the cosine ends, as a fraction of the peak."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's beta1, beta2."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices and kernels only."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is sampled from and saved; 0 turns it off."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast over fp32 master weights; None takes what `accelerate launch` says."""
    channels_last: bool = False
    """Memory format of networks and pictures; faster for convolutions."""
    compile: bool = False
    """Compile the network's blocks, each on its own, by torch.compile."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass in place of keeping them: less
    memory, a third more time."""
    num_workers: int = 1
    """Processes that fetch data, for each training process."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl and of the tracker."""
    sample_every: int = 1000
    """Steps between sample grids; 0 draws none."""
    validate_every: int = 1000
    """Steps between held-out losses, where there is held-out data; 0 measures none."""
    val_samples: int = 128
    """How many held-out samples."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept besides, for good; 0 keeps none."""
    push_to: str | None = None
    """Repository on the Hub, `org/name`, that the stage is pushed to with each checkpoint."""
    max_bad_steps: int = 10
    """Steps whose loss or gradient is not finite are left out; so many in a row end the run."""
    tracker: TrackerName = "none"
    """Where Accelerate sends metrics besides metrics.jsonl; wandb is offline without an account."""
    seed: int = 0
    """Seed of initialisation, order, noise and dropout."""

    def __post_init__(self) -> None:
        positive = ("max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate")
        often = ("log_every", "checkpoint_every", "keep_checkpoints", "val_samples")
        for name in (*positive, *often, "max_bad_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"fit.{name} must be above 0; got {getattr(self, name)}: use 1 or more"
                )
        every = ("sample_every", "validate_every", "keep_every")
        for name in ("warmup_steps", "weight_decay", *every, "num_workers", "lr_floor"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"fit.{name} must not be negative; got {getattr(self, name)}: use 0"
                )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"fit.ema_decay must lie in [0, 1); got {self.ema_decay}: use 0.999")
        if self.push_to is not None and self.push_to.count("/") != 1:
            raise ValueError(
                f"fit.push_to must be org/name; got {self.push_to!r}: name a repository on the Hub"
            )
        if self.max_grad_norm <= 0:
            raise ValueError(
                f"fit.max_grad_norm must be above 0; got {self.max_grad_norm}: use 1.0, or 1e9 to "
                "clip nothing"
            )


class Objective(nn.Module):
    """A stage as `fit` sees it: a network, its loss, and what to show and save of it.

    Frozen helpers (CLIP) live in the tuple `frozen`, which hides them from `parameters()`: what is
    registered as a submodule is trained, averaged and checkpointed.
    """

    frozen: tuple[nn.Module, ...] = ()
    """Modules that are used but not trained."""

    stage: str
    """Name of the sub-folder that `export` writes."""
    network: nn.Module
    """What is trained."""

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of one micro-batch.

        Args:
            batch: as the data set's samples are, stacked or listed.
            generator: of all that is random. What is drawn by `unclip.training.noise` is drawn for
                each sample on its own, and so is the same on any number of processes.

        Returns:
            `loss` (scalar); optionally `per_sample` [B] and `timesteps` [B] in [0, 1], from which
            the loss by timestep quartile is logged; other scalars are logged as they are.
        """
        raise NotImplementedError

    def preview(self) -> Tensor | None:
        """Pictures [B, 3, H, W] in [-1, 1] that show the state of training, or None."""
        return None

    def metrics(self) -> dict[str, float]:
        """What else to measure with each held-out loss, on the main process: name -> value."""
        return {}

    def export(self, folder: Path) -> None:
        """Write the stage's folder from the weights as they are now."""
        raise NotImplementedError

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of the modules that Accelerate shards one by one."""
        return sorted({type(block).__name__ for block in blocks(self.network)})


def learning_rate_factor(step: int, config: FitConfig) -> float:
    """Learning rate of `step` as a fraction of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(min(1.0, progress) * torch.pi)).item())
    return config.lr_floor + (1 - config.lr_floor) * cosine


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(trained(module).values())
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _micro_batch_size(config: FitConfig, num_processes: int) -> int:
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


def fit(
    objective: Objective,
    dataset: Dataset[Any],
    config: FitConfig,
    run: Path,
    *,
    resolved: Mapping[str, Any],
    fresh: bool = False,
    prepare_run: Callable[[Path], None] = lambda run: None,
    validation: Dataset[Any] | None = None,
) -> None:
    """Train `objective` on `dataset`, into the folder `run`.

    The folder gets `config.yaml` before the first step, `metrics.jsonl`, sample grids under
    `samples/`, checkpoints (without what is frozen) under `checkpoints/`, and the stage itself
    (averaged weights) under the objective's name. Running the same command again goes on from the
    last checkpoint, to the same weights as if it had never stopped.

    Args:
        objective: what to train.
        dataset: map-style; samples are dicts with `image` [3, H, W] in [-1, 1] and `caption`, or
            whatever else the objective reads.
        config: how.
        run: folder of this run.
        resolved: the whole config in plain values, written into the folder.
        fresh: start over, discarding what an earlier run left in the folder.
        prepare_run: writes what else the folder needs before the first step.
        validation: held-out samples of the same kind.

    Raises:
        ValueError: the folder holds a run with another config, batch_size cannot be shared out, the
            tracker is not installed, or too many steps in a row had no finite loss.
        OSError: the folder cannot be written, or a data worker died.
        SystemExit: with status `EXIT_STOPPED` after a signal (`unclip.training.signals`), once a
            checkpoint of the step is written.
    """
    if config.tracker == "wandb":
        offline_without_an_account()
    accelerator = make_accelerator(
        run, config.mixed_precision, config.gradient_accumulation_steps, config.tracker
    )
    _micro_batch_size(config, accelerator.num_processes)

    def open_run() -> None:
        checkpoints.open_run(run, resolved, fresh)
        prepare_run(run)

    on_main(accelerator, open_run)
    training = _Training(accelerator, objective, dataset, config, run, resolved)
    if validation is not None and config.validate_every:
        training.held_out = Validation(validation, config.val_samples, training.micro_batch_size)
    with stop_requests() as request, training:
        data = iter(loader(dataset, training.batches, config.num_workers))
        while training.step < config.max_steps:
            training.take_step(data)
            stop, failed = agree(
                accelerator, request.received is not None, training.checkpointer.failed
            )
            done, last = training.step, training.step == config.max_steps
            metrics: dict[str, float] = {}
            if last or done % config.log_every == 0:
                metrics |= training.means() | _skips(dataset, accelerator)
            if training.held_out and (last or done % config.validate_every == 0):
                metrics |= training.validate()
            if metrics:
                training.log(metrics)
            if config.sample_every and (last or done % config.sample_every == 0):
                training.preview()
            # The checkpoint comes last: what fails before it, a resumed run does again.
            if failed:
                on_main(accelerator, training.checkpointer.wait)
                raise SystemExit(2)
            if last or stop or done % config.checkpoint_every == 0:
                training.save()
            if stop and not last:
                training.checkpointer.wait()
                _say_stopped(accelerator, request.received, done)
                raise SystemExit(EXIT_STOPPED)
        on_main(accelerator, training.checkpointer.wait)


class _Training:
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
        self.micro_batch_size = _micro_batch_size(config, accelerator.num_processes)
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


def _say_stopped(accelerator: Accelerator, received: signal.Signals | None, step: int) -> None:
    if accelerator.is_main_process:
        name = "a signal to another process" if received is None else received.name
        log.warning(
            "stopped at step %d by %s; the same command goes on from there (exit status %d)",
            step,
            name,
            EXIT_STOPPED,
        )


def _skips(dataset: Dataset[Any], accelerator: Accelerator) -> dict[str, float]:
    """Samples that were skipped so far, by cause: the sum of what each process has come upon."""
    skips: Mapping[str, int] = getattr(dataset, "skips", {})
    counts = torch.tensor(list(skips.values()), dtype=torch.float, device=accelerator.device)
    if len(skips) == 0:
        return {}
    total = accelerator.reduce(counts).tolist()
    return {f"skipped/{k}": n for k, n in zip(skips, total, strict=True) if n}


def _to_device(batch: dict[str, Any], device: torch.device, channels_last: bool) -> dict[str, Any]:
    moved = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
            if channels_last and value.ndim == 4:
                value = value.to(memory_format=torch.channels_last)
        moved[name] = value
    return moved
