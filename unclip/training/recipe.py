"""How long a run trains, how fast, and how often it reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from unclip.training.tracking import TrackerName


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


def learning_rate_factor(step: int, config: FitConfig) -> float:
    """Learning rate of `step` as a fraction of the peak."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(min(1.0, progress) * torch.pi)).item())
    return config.lr_floor + (1 - config.lr_floor) * cosine
