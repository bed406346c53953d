"""A run's folder: its config, and checkpoints that are there whole or not at all."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

log = logging.getLogger(__name__)

MAY_CHANGE = {
    "fresh",
    "run",  # a run's folder may be moved
    *(
        f"fit.{name}"
        for name in (
            "max_steps",
            "num_workers",
            "log_every",
            "sample_every",
            "checkpoint_every",
            "keep_checkpoints",
            "tracker",
            "compile",
        )
    ),
}
"""Settings that a resumed run may be given anew; any other difference is another run."""


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(k for k in new if k not in old)]
        dot = "." if name else ""
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{name}{dot}{k}")]
    return [] if old == new or name in MAY_CHANGE else [f"{name}: {old} there, {new} here"]


def start_from(network: nn.Module, other: nn.Module, init: str | Path, sizes: str) -> None:
    """Take the weights of `other`, found under the name `init`.

    Args:
        network: what is to be trained.
        other: a network of the same class and sizes.
        init: the setting that named it, for the error.
        sizes: the setting that holds the network's sizes, for the error.

    Raises:
        ValueError: the two differ in their sizes.
    """
    try:
        network.load_state_dict(other.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"init must have a {type(network).__name__} of the sizes in {sizes}; got {init}, which "
            f"differs ({str(error).splitlines()[1].strip()}): set {sizes}.* to what its config says"
        ) from error


def open_run(run: Path, resolved: Mapping[str, Any], fresh: bool) -> None:
    """Make the run's folder and write `config.yaml` into it, before the first step.

    Raises:
        ValueError: the folder holds a run with another config.
        OSError: the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in ("checkpoints", "samples"):
                shutil.rmtree(run / name, ignore_errors=True)
            (run / "metrics.jsonl").unlink(missing_ok=True)
        path = run / "config.yaml"
        # YAML has no tuples: compare what was written with what would be.
        text = yaml.safe_dump(dict(resolved), sort_keys=False)
        if path.is_file() and not fresh and latest(run) is not None:
            changed = _differences(yaml.safe_load(path.read_text()), yaml.safe_load(text))
            if changed:
                raise ValueError(
                    f"{run} holds a run with another config ({'; '.join(changed[:5])}): "
                    "pass the same config, another --run, or --fresh to start over"
                )
        path.write_text(text)
    except OSError as error:
        raise OSError(
            f"cannot write the run folder {run}: {error.strerror}; choose another with --run"
        ) from error


def latest(run: Path) -> Path | None:
    """The newest checkpoint's folder, or None."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def resume(accelerator: Accelerator, run: Path) -> int:
    """Load the newest checkpoint, if any, and return the number of steps it has behind it."""
    folder = latest(run)
    if folder is None:
        return 0
    accelerator.load_state(str(folder))
    step = int(folder.name.removeprefix("step-"))
    if accelerator.is_main_process:
        log.warning("resuming %s from step %d", run, step)
    return step


def save(accelerator: Accelerator, run: Path, step: int, keep: int) -> None:
    """Write a checkpoint aside, rename it into place, and drop the oldest beyond `keep`.

    Raises:
        OSError: it could not be written whole; the checkpoints before it are untouched.
    """
    folder = run / "checkpoints" / f"step-{step:07d}"
    aside = folder.with_name(f".writing-{step:07d}")
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(aside))
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: Python's, torch's, its
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"could not write the checkpoint of step {step} to {folder.parent} ({error}); "
            "the ones before it are untouched: free some space and run the same command again"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        aside.rename(folder)
        for old in sorted(folder.parent.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
