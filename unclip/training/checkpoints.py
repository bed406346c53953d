"""A run's folder: its config, and checkpoints that are there whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

log = logging.getLogger(__name__)

MAY_CHANGE = {
    "fresh",
    "run",  # a run's folder may be moved
    "source.copies_gb",
    "source.index_beside",
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


def differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str]) -> str:
    """Where two configs differ but in what `may_change`, the first five places; "" if nowhere."""

    def places(old: Any, new: Any, name: str = "") -> Iterator[str]:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for key in [*old, *(key for key in new if key not in old)]:
                yield from places(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        elif old != new and name not in may_change:
            yield f"{name}: {old} there, {new} here"

    return "; ".join(itertools.islice(places(old, new), 5))


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
            there = yaml.safe_load(path.read_text())
            if changed := differences(there, yaml.safe_load(text), MAY_CHANGE):
                raise ValueError(
                    f"{run} holds a run with another config ({changed}): "
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


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _leave_out_frozen(
    models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str
) -> None:
    """Take what is not trained out of what is about to be saved: a run that is started again gets
    it from where it got it at first."""
    del folder
    for model, tensors in zip(models, weights, strict=False):
        for name in _frozen(model):
            tensors.pop(name, None)


def _check_names(models: list[nn.Module], folder: str) -> None:
    """Raise ValueError unless a checkpoint holds all that is trained, and nothing unknown."""
    for model in models:
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            there = set(file.keys())
        known = set(model.state_dict())
        lacking, unknown = sorted(known - _frozen(model) - there), sorted(there - known)
        for fault, names in (("lacks", lacking), ("has no place for", unknown)):
            if names:
                more = f" and {len(names) - 3} more" if names[3:] else ""
                raise ValueError(
                    f"the checkpoint {folder} {fault} {', '.join(names[:3])}{more}: it is of "
                    "another run; remove it to go on from the one before, or pass --fresh"
                )


class FrozenWeights:
    """Stands in a checkpoint for the weights that it leaves out: a short hash of them, by which a
    run that goes on knows that it got the same ones again."""

    def __init__(self, module: nn.Module) -> None:
        digest = hashlib.sha256()
        for name, parameter in sorted(module.named_parameters()):
            if not parameter.requires_grad:
                sample = parameter.detach().flatten()[:64].half().cpu().numpy().tobytes()
                digest.update(name.encode() + sample)
        self.fingerprint = digest.hexdigest()[:16]

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint holds."""
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Raises ValueError where a checkpoint was written with other frozen weights."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "init must hold the weights that this run started from, for those it does not "
                f"train; got others, {self.fingerprint} for {state['fingerprint']}: put the model "
                "back as it was, or pass --fresh to start over"
            )


def resume(accelerator: Accelerator, run: Path) -> int:
    """Load the newest checkpoint, if any, and return the number of steps it has behind it.

    Raises:
        ValueError: it lacks some of what is trained, or the weights that are not trained are not
            those it was written with.
    """
    folder = latest(run)
    if folder is None:
        return 0
    check = accelerator.register_load_state_pre_hook(_check_names)
    try:
        accelerator.load_state(str(folder), strict=False)
    finally:
        check.remove()
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
    hook = accelerator.register_save_state_pre_hook(_leave_out_frozen)
    try:
        accelerator.save_state(str(aside))
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk: Python's, torch's, its
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"could not write the checkpoint of step {step} to {folder.parent} ({error}); "
            "the ones before it are untouched: free some space and run the same command again"
        ) from error
    finally:
        hook.remove()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        aside.rename(folder)
        for old in sorted(folder.parent.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
