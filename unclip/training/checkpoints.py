"""A run's folder: its config, and checkpoints that are there whole or not at all.

A checkpoint is a folder of torch.distributed.checkpoint: each process writes what it holds, and
any number of processes reads it. In it are also `progress.json`, what is not a tensor, and
`SHA256SUMS` (`sha256sum -c` reads it), without which the folder is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from unclip.checkpoint import written_file
from unclip.training.ema import Average
from unclip.training.parallel import from_main, on_main
from unclip.training.tracking import WANDB_ID

log = logging.getLogger(__name__)

# That a run of one process saves as one is no news.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

SUMS_NAME = "SHA256SUMS"
PROGRESS_NAME = "progress.json"
LOCK_TIMEOUT = 20
"""Seconds to wait for a run's folder."""

MAY_CHANGE = {
    "fresh",
    "run",  # a run's folder may be moved
    "source.copies_gb",
    "source.index_beside",
    "val_data",
    *(
        f"fit.{name}"
        for name in (
            "max_steps",
            "num_workers",
            "log_every",
            "sample_every",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_every",
            "push_to",
            "validate_every",
            "val_samples",
            "max_bad_steps",
            "gradient_accumulation_steps",
            "activation_checkpointing",
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


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold a run's folder, made if need be, so that no other process trains into it meanwhile.

    The operating system takes the lock back from a process that ends in whatever way; the processes
    that read data for it hold it a few seconds longer, which is waited for.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be written.
    """
    lock = FileLock(run / ".lock", timeout=LOCK_TIMEOUT)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{run} must be one process's at a time; got a run that goes on there: wait for its "
            "end, or choose another --run"
        ) from error
    except OSError as error:
        raise unwritable(run, error) from error
    try:
        yield
    finally:
        lock.release()


def unwritable(run: Path, error: OSError) -> OSError:
    """The same error in words."""
    return OSError(
        f"cannot write the run folder {run}: {error.strerror}; choose another with --run"
    )


def open_run(run: Path, resolved: Mapping[str, Any], fresh: bool) -> None:
    """Write `config.yaml` into a run's folder, before the first step.

    Raises:
        ValueError: the folder holds a run with another config.
        OSError: the folder cannot be written.
    """
    try:
        if fresh:
            for name in ("checkpoints", "samples"):
                shutil.rmtree(run / name, ignore_errors=True)
            for name in ("metrics.jsonl", WANDB_ID):
                (run / name).unlink(missing_ok=True)
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
        with written_file(path) as aside:
            aside.write_text(text)
    except OSError as error:
        raise unwritable(run, error) from error


def latest(run: Path) -> Path | None:
    """The newest checkpoint's folder, or None."""
    found = sorted((run / "checkpoints").glob("step-*"))
    return found[-1] if found else None


# --------------------------------------------------------------------------------- whole or not


def _drop(folder: Path) -> None:
    """Remove a checkpoint: at once as far as anybody sees, whenever this process may be killed."""
    aside = folder.with_name(f".dropped-{folder.name}")
    folder.rename(aside)
    shutil.rmtree(aside)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write the sums of a folder's files, and have the disk hold what was written."""
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in names]
    with (folder / SUMS_NAME).open("w") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    sums = folder / SUMS_NAME
    if not sums.is_file():
        return f"{SUMS_NAME} is missing"
    for line in sums.read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if not name or not (folder / name).is_file():
            return f"{name or SUMS_NAME} is missing or cut short"
        if _sha256(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones before it are renamed,
    with a warning, to `damaged-...`. None where the run has no checkpoint.

    Raises:
        ValueError: it has some, and all are damaged.
    """
    found = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for folder in found:
        fault = damage(folder)
        if fault is None:
            return folder
        if folder is found[-1]:
            raise ValueError(
                f"{run} must hold a checkpoint that is whole; got {len(found)}, all damaged, the "
                f"last looked at {folder} ({fault}): put one back from a copy, or pass --fresh to "
                "start over"
            )
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.warning("the checkpoint %s is damaged (%s): using the one before it", folder, fault)
    return None


# ----------------------------------------------------------------------------- what is in it


class Trained:
    """The tensors of a run as a checkpoint holds them: those of what is trained, sharded or not.

    Args:
        module: the objective, prepared for training.
        optimizer: torch's own.
        average: of the module's weights.
    """

    options = StateDictOptions(ignore_frozen_params=True, strict=False)

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.average = average

    def state(self) -> dict[str, Any]:
        """The tensors themselves, not copies."""
        averages = {} if self.average.ema is None else self.average.tensors
        return {
            "model": get_model_state_dict(self.module, options=self.options),
            "optimizer": get_optimizer_state_dict(
                self.module, self.optimizer, options=self.options
            ),
            "ema": averages,
        }

    def load(self, folder: Path) -> None:
        """Read a checkpoint's tensors.

        Raises:
            ValueError: it lacks some of them, or has others or of other shapes.
        """
        state = self.state()
        _check_fits(folder, {name: state[name] for name in ("model", "ema")})
        dcp.load(state, checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())
        set_model_state_dict(self.module, state["model"], options=self.options)
        set_optimizer_state_dict(
            self.module, self.optimizer, state["optimizer"], options=self.options
        )


def read_weights(folder: Path, part: Literal["ema", "model"] = "model") -> dict[str, Tensor]:
    """The averaged weights of a checkpoint, or those in training, whole and on the CPU, however
    many processes wrote it; {} where it has no averages."""
    prefix = f"{part}."
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(meta, TensorStorageMetadata) and name.startswith(prefix)
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _check_fits(folder: Path, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    there = {
        name: tuple(meta.size)
        for name, meta in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(meta, TensorStorageMetadata) and name.split(".")[0] in state
    }
    here = {
        f"{part}.{n}": tuple(t.shape) for part, named in state.items() for n, t in named.items()
    }
    other = [
        f"{name} {list(there[name])} there, {list(here[name])} here"
        for name in sorted(here.keys() & there.keys())
        if here[name] != there[name]
    ]
    for fault, names in (
        ("lacks", sorted(here.keys() - there.keys())),
        ("has no place for", sorted(there.keys() - here.keys())),
        ("has other shapes:", other),
    ):
        if names:
            more = f" and {len(names) - 3} more" if names[3:] else ""
            raise ValueError(
                f"the checkpoint {folder} {fault} {', '.join(names[:3])}{more}: it is of "
                "another run; remove it to go on from the one before, or pass --fresh"
            )


def frozen_fingerprint(module: nn.Module) -> str | None:
    """A short hash of the weights that are not trained, which a checkpoint leaves out; None where
    all are."""
    digest, any_frozen = hashlib.sha256(), False
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad:
            any_frozen = True
            sample = parameter.detach().flatten()[:64].half().cpu().numpy().tobytes()
            digest.update(name.encode() + sample)
    return digest.hexdigest()[:16] if any_frozen else None


# ------------------------------------------------------------------------- loading and saving


def resume(
    accelerator: Accelerator, run: Path, trained: Trained, frozen: str | None
) -> dict[str, Any]:
    """Load the newest whole checkpoint and return its progress; {} where there is none.

    Raises:
        ValueError: all are damaged; it is of another model; or the weights that are not trained are
            not those it was written with.
    """
    chosen: list[Path | None] = [None]

    def choose() -> None:
        chosen[0] = newest_whole(run)

    on_main(accelerator, choose)
    name = from_main(accelerator, None if chosen[0] is None else chosen[0].name)
    if name is None:
        return {}
    folder = run / "checkpoints" / name
    progress = json.loads((folder / PROGRESS_NAME).read_text())
    if progress["frozen"] != frozen:
        raise ValueError(
            "init must hold the weights that this run started from, for those it does not "
            f"train; got others, {frozen} for {progress['frozen']}: put the model "
            "back as it was, or pass --fresh to start over"
        )
    trained.load(folder)
    if accelerator.is_main_process:
        log.warning("resuming %s from step %d", run, progress["step"])
        if progress["num_processes"] != accelerator.num_processes:
            log.warning(
                "it ran on %d processes and goes on with %d: the same batches, noise and "
                "timesteps, but sums in another order and other dropout",
                progress["num_processes"],
                accelerator.num_processes,
            )
    return progress


class Checkpointer:
    """Writes checkpoints beside the training: it goes on as soon as the tensors are copied.

    Args:
        accelerator: of the run.
        run: its folder.
        keep: how many of the newest to keep.
        keep_every: those of every so many steps are kept besides; 0 keeps none.
    """

    def __init__(self, accelerator: Accelerator, run: Path, keep: int, keep_every: int = 0) -> None:
        self.accelerator = accelerator
        self.folder = run / "checkpoints"
        self.keep, self.keep_every = keep, keep_every
        self.distributed = torch.distributed.is_initialized()
        # Of its own: the training's messages must not meet with those of a save.
        self.group = torch.distributed.new_group(backend="gloo") if self.distributed else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None

    def save(
        self,
        trained: Trained,
        progress: Mapping[str, Any],
        export: Callable[[], None],
        push: Callable[[Path], None] | None = None,
    ) -> None:
        """Copy the tensors now, and write them aside and rename them into place meanwhile.

        Args:
            trained: what to save.
            progress: plain values, with `step`.
            export: writes what belongs to this step besides, before the checkpoint is in place: a
                run that goes on does again what failed.
            push: called afterwards with the checkpoint's folder.

        Raises:
            OSError: the save before this one failed, or this one cannot begin.
        """
        self.wait()
        folder = self.folder / f"step-{progress['step']:07d}"
        aside = folder.with_name(f".writing-{progress['step']:07d}")

        def clear() -> None:
            for left in (*self.folder.glob(".writing-*"), *self.folder.glob(".dropped-*")):
                shutil.rmtree(left)
            aside.mkdir(parents=True)
            (aside / PROGRESS_NAME).write_text(json.dumps(dict(progress)))

        with _named(folder):
            on_main(self.accelerator, clear)
            written = dcp.async_save(
                trained.state(),
                checkpoint_id=aside,
                process_group=self.group,  # type: ignore[arg-type]
                no_dist=not self.distributed,
            )
        finish = self._finish if self.accelerator.is_main_process else None
        self.pending = self.thread.submit(_write, written, aside, folder, export, finish, push)

    def _finish(self, aside: Path, folder: Path) -> None:
        seal(aside)
        if folder.exists():
            _drop(folder)
        aside.rename(folder)
        _sync(self.folder)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            step = int(old.name.removeprefix("step-"))
            if not (self.keep_every and step % self.keep_every == 0):
                _drop(old)

    @property
    def failed(self) -> bool:
        """Whether a save has failed that nobody has heard of yet."""
        done = self.pending is not None and self.pending.done()
        return done and self.pending.exception() is not None  # type: ignore[union-attr]

    def wait(self) -> None:
        """Until what is being written is there.

        Raises:
            OSError: it could not be written whole; the checkpoints before it are untouched.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let what is being written come to its end, well or not."""
        self.thread.shutdown(wait=True)


def _write(
    written: Any,
    aside: Path,
    folder: Path,
    export: Callable[[], None],
    finish: Callable[[Path, Path], None] | None,
    push: Callable[[Path], None] | None,
) -> None:
    try:
        with _named(folder):
            written.result()
        if finish is not None:
            export()
            with _named(folder):
                finish(aside, folder)
    except BaseException:
        if finish is not None:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if finish is not None and push is not None:
        push(folder)


class _named:
    """Names the checkpoint in what goes wrong with writing it: a full disk has an error of
    Python's, of torch's and of torch.distributed's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, RuntimeError, CheckpointException)):
            step = int(self.folder.name.removeprefix("step-"))
            raise OSError(
                f"could not write the checkpoint of step {step} to {self.folder.parent} "
                f"({_reason(error)}); the ones before it are untouched: free some space and run "
                "the same command again"
            ) from error


def _reason(error: BaseException) -> str:
    """The first line of what one process said: torch.distributed puts all tracebacks together."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error).split("\n")[0]
