"""`fit`: the one training loop. What differs between stages is the objective it is given."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from unclip.training import checkpoints
from unclip.training.batches import loader
from unclip.training.noise import draw
from unclip.training.objective import Objective
from unclip.training.parallel import agree, make_accelerator, on_main
from unclip.training.recipe import FitConfig, learning_rate_factor
from unclip.training.signals import EXIT_STOPPED, stop_requests
from unclip.training.state import Training, micro_batch_size_of
from unclip.training.tracking import offline_without_an_account
from unclip.training.validation import Validation

log = logging.getLogger(__name__)

__all__ = ["FitConfig", "Objective", "draw", "fit", "learning_rate_factor"]


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
        ValueError: the folder holds a run with another config, or one that is still going,
            batch_size cannot be shared out, the tracker is not installed, or too many steps in a
            row had no finite loss.
        OSError: the folder cannot be written, or a data worker died.
        SystemExit: with status `EXIT_STOPPED` after a signal (`unclip.training.signals`), once a
            checkpoint of the step is written.
    """
    if config.tracker == "wandb":
        offline_without_an_account()
    accelerator = make_accelerator(
        run, config.mixed_precision, config.gradient_accumulation_steps, config.tracker
    )
    micro_batch_size_of(config, accelerator.num_processes)

    with ExitStack() as held:

        def open_run() -> None:
            held.enter_context(checkpoints.alone(run))
            checkpoints.open_run(run, resolved, fresh)
            prepare_run(run)

        on_main(accelerator, open_run)
        training = Training(accelerator, objective, dataset, config, run, resolved)
        if validation is not None and config.validate_every:
            held_out = Validation(validation, config.val_samples, training.micro_batch_size)
            training.held_out = held_out
        _loop(training, dataset)


def _loop(training: Training, dataset: Dataset[Any]) -> None:
    """Steps, and what is due after each."""
    accelerator, config = training.accelerator, training.config
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
