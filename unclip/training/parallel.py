"""Processes that train together: the accelerator, what they agree on, and blocks of a network."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)


def make_accelerator(
    run: Path, mixed_precision: str | None, gradient_accumulation_steps: int, tracker: str
) -> Accelerator:
    """Accelerate's view of the processes that were started, on the GPUs or on the CPU.

    Raises:
        ValueError: they were started for a kind of sharding that `fit` has no checkpoints for.
    """
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "distributed_type must be NO, MULTI_GPU or FSDP; got DEEPSPEED, whose optimizer steps "
            "within the backward pass, out of reach of fit's guards, averages and checkpoints: "
            "take configs/accelerate/fsdp2.yaml, which shards the same things"
        )
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        # Unless told, Accelerate takes the processes of a machine without a GPU for strangers, each
        # of which trains alone into the same folder.
        state = PartialState(cpu=True)
        if _asked_for("ACCELERATE_USE_FSDP") and state.num_processes > 1:
            # It shards on GPUs only, but what it calls does so on the CPU too: a trial of a config.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=None if tracker == "none" else tracker,
        project_dir=str(run),
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError(
                "fsdp_version must be 2; got 1, whose shards fit has no checkpoints for: take "
                "configs/accelerate/fsdp2.yaml"
            )
        # Autocast chooses what runs in bf16, as it does unsharded. FSDP's own policy would round
        # all that enters the objective: pictures, noise and the loss with its bound.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    launched_on_cpu = os.environ.get("ACCELERATE_USE_CPU") == "True"
    if launched_on_cpu and "MASTER_ADDR" in os.environ and accelerator.num_processes == 1:
        log.warning(
            "accelerate launch --cpu starts one process, whatever --num_processes says; for N on "
            "the CPU: CUDA_VISIBLE_DEVICES= accelerate launch --multi_gpu --num_processes N SCRIPT"
        )
    return accelerator


def patient_accelerator(mixed_precision: Literal["no", "fp16", "bf16"] = "no") -> Accelerator:
    """Accelerate's view of processes that work through a share each: one that has done its own
    waits for the slowest, longer than a collective may elsewhere."""
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))],
    )


def _asked_for(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def on_main(accelerator: Accelerator, function: Callable[[], None]) -> None:
    """Run on the main process while the others wait; where it raises, none goes on.

    Raises:
        SystemExit: with status 2 on the others, which leave the telling to the main process.
    """
    failure: BaseException | None = None
    if accelerator.is_main_process:
        try:
            function()
        except Exception as error:
            failure = error
    if any_process(accelerator, failure is not None):
        if failure is not None:
            raise failure
        raise SystemExit(2)


def agree(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Which of the flags are up on any process; each has to ask at the same time."""
    values = torch.tensor(flags, dtype=torch.float, device=accelerator.device)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return [value > 0 for value in values.tolist()]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether a flag is up on any process."""
    return agree(accelerator, flag)[0]


def from_main(accelerator: Accelerator, value: str | None) -> str | None:
    """What the main process says."""
    if accelerator.num_processes == 1:
        return value
    (said,) = broadcast_object_list([value])
    return said


def share_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Give all processes the main one's buffers (a batch norm's running means differ, and those of
    the main process are what a run ends with), as DDP does before each step."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, the members of its lists of modules: what is sharded,
    recomputed and compiled one by one."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(m) for one in lists for member in one for m in member.modules() if m is not member}
    return [member for one in lists if id(one) not in inner for member in one]


def recompute(block: nn.Module) -> None:
    """Have the backward pass compute a block's activations again in place of keeping them."""
    forward = block.forward
    block.forward = functools.partial(checkpoint, forward, use_reentrant=False)  # type: ignore


def is_finite(*values: Tensor) -> bool:
    """Whether all numbers of some tensors are."""
    return all(bool(torch.isfinite(value).all()) for value in values)
