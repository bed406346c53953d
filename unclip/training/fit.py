"""`fit`: the one training loop. What differs between stages is the objective it is given."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import save_image
from tqdm.auto import tqdm

from unclip.diffusion import NoiseSchedule
from unclip.training import checkpoints
from unclip.training.batches import GlobalBatches, loader

log = logging.getLogger(__name__)


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
    """Run the training step through torch.compile."""
    num_workers: int = 1
    """Processes that fetch data, for each training process."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl and of the tracker."""
    sample_every: int = 1000
    """Steps between sample grids; 0 draws none."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Where Accelerate sends metrics besides metrics.jsonl; wandb is offline without an account."""
    seed: int = 0
    """Seed of initialisation, order, noise and dropout."""

    def __post_init__(self) -> None:
        positive = ("max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate")
        for name in (*positive, "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"fit.{name} must be above 0; got {getattr(self, name)}: use 1 or more"
                )
        for name in ("warmup_steps", "weight_decay", "sample_every", "num_workers", "lr_floor"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"fit.{name} must not be negative; got {getattr(self, name)}: use 0"
                )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"fit.ema_decay must lie in [0, 1); got {self.ema_decay}: use 0.999")
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

        Returns:
            `loss` (scalar); optionally `per_sample` [B] and `timesteps` [B] in [0, 1], from which
            the loss by timestep quartile is logged; other scalars are logged as they are.
        """
        raise NotImplementedError

    def preview(self) -> Tensor | None:
        """Pictures [B, 3, H, W] in [-1, 1] that show the state of training, or None."""
        return None

    def export(self, folder: Path) -> None:
        """Write the stage's folder from the weights as they are now."""
        raise NotImplementedError


def draw(
    x_0: Tensor, schedule: NoiseSchedule, generator: torch.Generator, shift: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Timesteps [B] and Gaussian noise of x_0's shape, both from `generator`.

    Uniform u in [0, 1) is moved to shift u / (1 + (shift - 1) u) (Esser et al. 2024, equation 23):
    1 leaves the timesteps uniform, above 1 the noisy ones are drawn more often.
    """
    u = torch.rand(len(x_0), generator=generator, device=x_0.device)
    u = shift * u / (1 + (shift - 1) * u)
    steps = schedule.config.num_train_timesteps
    timesteps = (u * steps).long().clamp(max=steps - 1)
    return timesteps, torch.randn(x_0.shape, generator=generator, device=x_0.device)


def learning_rate_factor(step: int, config: FitConfig) -> float:
    """Learning rate of `step` as a fraction of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(min(1.0, progress) * torch.pi)).item())
    return config.lr_floor + (1 - config.lr_floor) * cosine


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen: what is optimised, averaged and checkpointed."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in trained(module) if p.ndim > 1]
    vectors = [p for p in trained(module) if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _accelerator(config: FitConfig, run: Path) -> Accelerator:
    if config.tracker == "wandb" and not (
        os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()
    ):
        os.environ.setdefault("WANDB_MODE", "offline")
    accelerator = Accelerator(
        # Unless told, Accelerate takes the processes of a machine without a GPU for strangers, each
        # of which trains alone into the same folder.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(run),
    )
    if config.tracker != "none" and not accelerator.log_with:  # Accelerate would drop it silently
        raise ValueError(
            f"fit.tracker needs {config.tracker}, which is not installed: "
            f"pip install {config.tracker}, or use none"
        )
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True"
    if launched_on_cpu and "MASTER_ADDR" in os.environ and accelerator.num_processes == 1:
        log.warning(
            "accelerate launch --cpu starts one process, whatever --num_processes says; for N on "
            "the CPU: CUDA_VISIBLE_DEVICES= accelerate launch --multi_gpu --num_processes N SCRIPT"
        )
    return accelerator


def _micro_batch_size(config: FitConfig, num_processes: int) -> int:
    shares = num_processes * config.gradient_accumulation_steps
    if config.batch_size % shares:
        near = max(1, round(config.batch_size / shares)) * shares
        raise ValueError(
            "fit.batch_size must be a multiple of processes x gradient_accumulation_steps = "
            f"{shares}; got {config.batch_size}: use {near}"
        )
    return config.batch_size // shares


@contextmanager
def averaged(ema: EMAModel | None, module: nn.Module) -> Iterator[None]:
    """Within the block, `module` holds the averaged weights."""
    if ema is None:
        yield
        return
    ema.store(trained(module))
    ema.copy_to(trained(module))
    try:
        yield
    finally:
        ema.restore(trained(module))


class Meter:
    """Means of logged values since the last line, and of the loss by timestep quartile."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, out: Mapping[str, Tensor]) -> None:
        for name, value in out.items():
            if value.ndim == 0:
                self.sums[name] += value.item()
                self.counts[name] += 1
        if "timesteps" in out:
            quartile = (out["timesteps"] * 4).long().clamp(max=3).tolist()
            for q, value in zip(quartile, out["per_sample"].tolist(), strict=True):
                self.sums[f"loss_q{q + 1}"] += value
                self.counts[f"loss_q{q + 1}"] += 1

    def read(self) -> dict[str, float]:
        means = {name: self.sums[name] / self.counts[name] for name in sorted(self.sums)}
        self.sums.clear()
        self.counts.clear()
        return means


def fit(
    objective: Objective,
    dataset: Dataset[Any],
    config: FitConfig,
    run: Path,
    *,
    resolved: Mapping[str, Any],
    fresh: bool = False,
    prepare_run: Callable[[Path], None] = lambda run: None,
) -> None:
    """Train `objective` on `dataset`, into the folder `run`.

    The folder gets `config.yaml` before the first step, `metrics.jsonl`, sample grids under
    `samples/`, checkpoints (without what is frozen) under `checkpoints/`, and the stage itself
    (averaged weights) under the objective's name. Running the same command again goes on from the
    last checkpoint.

    Args:
        objective: what to train.
        dataset: map-style; samples are dicts with `image` [3, H, W] in [-1, 1] and `caption`, or
            whatever else the objective reads.
        config: how.
        run: folder of this run.
        resolved: the whole config in plain values, written into the folder.
        fresh: start over, discarding what an earlier run left in the folder.
        prepare_run: writes what else the folder needs before the first step.

    Raises:
        ValueError: the folder holds a run with another config, batch_size cannot be shared out, or
            the tracker is not installed.
        OSError: the folder cannot be written.
    """
    accelerator = _accelerator(config, run)
    micro_batch_size = _micro_batch_size(config, accelerator.num_processes)
    if accelerator.is_main_process:
        checkpoints.open_run(run, resolved, fresh)
        prepare_run(run)
    accelerator.wait_for_everyone()
    set_seed(config.seed + accelerator.process_index)

    objective.to(accelerator.device)
    for helper in objective.frozen:
        helper.to(accelerator.device)
    if config.channels_last:
        objective.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        _parameter_groups(objective, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_eps,
        fused=True,
    )
    ema = EMAModel(trained(objective), decay=config.ema_decay) if config.ema_decay > 0 else None
    step_module, optimizer = accelerator.prepare(objective, optimizer)
    if config.compile:
        step_module = torch.compile(step_module)
    if ema is not None:
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    parameters = trained(objective)
    if len(parameters) < len(list(objective.parameters())):
        accelerator.register_for_checkpointing(checkpoints.FrozenWeights(objective))
    first_step = checkpoints.resume(accelerator, run)
    if config.tracker != "none":
        accelerator.init_trackers(
            "unclip",
            config=_flat(resolved),
            init_kwargs={"wandb": {"dir": str(run), "name": run.name}},
        )

    batches = GlobalBatches(
        dataset,
        batch_size=config.batch_size,
        micro_batch_size=micro_batch_size,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        first_batch=first_step,
        seed=config.seed,
    )
    data = iter(loader(dataset, batches, config.num_workers))
    meter, clock, seen = Meter(), time.perf_counter(), 0
    bar = tqdm(
        total=config.max_steps,
        initial=first_step,
        desc=objective.stage,
        unit="step",
        disable=not accelerator.is_main_process,
    )
    for step in range(first_step, config.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        # Noise, timesteps and dropped conditions of a step follow from (seed, step, rank) alone.
        noise_seed = (config.seed * 1_000_003 + step) * 4099 + accelerator.process_index
        generator = torch.Generator(accelerator.device).manual_seed(noise_seed)
        for _ in range(config.gradient_accumulation_steps):
            batch = _to_device(next(data), accelerator.device, config.channels_last)
            with accelerator.accumulate(step_module):
                out = step_module(batch, generator)
                accelerator.backward(out["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    meter.add({"grad_norm": torch.as_tensor(norm)})
                optimizer.step()
                optimizer.zero_grad()
            meter.add({name: value.detach().float() for name, value in out.items()})
        if ema is not None:
            ema.step(parameters)
        seen += config.batch_size
        done = step + 1
        bar.update()
        last = done == config.max_steps
        if done % config.log_every == 0 or last:
            now = time.perf_counter()
            metrics = meter.read() | {
                "learning_rate": optimizer.param_groups[0]["lr"],
                "samples": done * config.batch_size,
                "samples_per_second": seen / (now - clock),
            }
            metrics |= _skips(dataset, accelerator)
            clock, seen = now, 0
            bar.set_postfix(
                loss=f"{metrics['loss']:.4g}", pictures_s=f"{metrics['samples_per_second']:.0f}"
            )
            if accelerator.is_main_process:
                with (run / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": done, **metrics}) + "\n")
            accelerator.log(metrics, step=done)
        if last or done % config.checkpoint_every == 0:
            # The checkpoint comes last: what fails before it, a resumed run does again.
            if accelerator.is_main_process:
                with averaged(ema, objective):
                    objective.export(run / objective.stage)
            checkpoints.save(accelerator, run, done, config.keep_checkpoints)
        if config.sample_every and (last or done % config.sample_every == 0):
            if accelerator.is_main_process:
                with averaged(ema, objective):
                    _save_preview(objective, run / "samples" / f"step-{done:07d}.png")
            accelerator.wait_for_everyone()
            clock = time.perf_counter()
    bar.close()
    accelerator.end_training()


def _save_preview(objective: Objective, path: Path) -> None:
    objective.eval()
    with torch.no_grad():
        pictures = objective.preview()
    objective.train()
    if pictures is not None:
        path.parent.mkdir(exist_ok=True)
        save_image((pictures.float().cpu() + 1) / 2, path, nrow=max(1, round(len(pictures) ** 0.5)))


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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level with dotted names, each a type every tracker takes."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, (int, float, str)) else str(value)
    return flat
