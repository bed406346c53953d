"""A stage on disk: a folder with `config.yaml` (plain text) and `model.safetensors`, no pickle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG_NAME = "config.yaml"
WEIGHTS_NAME = "model.safetensors"
MAPPED_BYTES = 2**28
"""Of a file whose weights are copied, how much stays mapped: what was read of it is in memory."""
Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes `folder`'s place only once everything in it is written.

    If writing fails (a full disk, say) the folder that was there before stays as it was.

    Raises:
        OSError: naming the folder, when it cannot be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"cannot write {folder}: {error.strerror}; choose an output folder you may write to"
        ) from error
    try:
        yield temporary
        # mkdtemp makes folders only their owner may read; a checkpoint is as public as its parent.
        temporary.chmod(0o777 & ~_umask())
        old = folder.with_name(f".{folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            f"could not write {folder}: {reason}; what was there before is untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; what is written there takes `path`'s place once it is whole.

    If writing fails the file that was there before stays as it was. What a kill leaves aside is
    written over the next time. One process at a time may write a path.
    """
    aside = aside_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Where `written_file` writes."""
    return path.with_name(f".{path.name}.part")


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def save_weights(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None
) -> None:
    """Write tensors as safetensors; floating-point ones in `dtype` if given.

    Raises:
        OSError: when the file cannot be written whole.
    """
    plain = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    try:
        save_file(plain, path)
    except SafetensorError as error:  # safetensors reports a full disk as an error of its own
        raise OSError(f"{path}: {error}") from error
    path.chmod(0o666 & ~_umask())  # safetensors makes files only their owner may read


def load_weights(
    path: Path,
    dtype: torch.dtype | None = None,
    keep: Collection[str] = (),
    mapped: bool = True,
) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: the file.
        dtype: of floating-point tensors; those of another are converted one at a time, so that the
            file and what is made of it are never in memory together. None keeps each tensor's own.
        keep: names of tensors that are fp32 whatever `dtype` says.
        mapped: leave what needs no conversion in the file, mapped into memory. False copies it,
            for those who put tensors together anew: a file stays in memory as long as any of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the folder is not a whole stage; copy it again"
        )
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        while names:
            copied = 0
            with safe_open(path, "pt") as file:
                while names and copied < MAPPED_BYTES:
                    name = names.pop(0)
                    stored = file.get_tensor(name)
                    tensors[name] = cast(name, stored, dtype, keep)
                    if tensors[name] is stored and not mapped:
                        tensors[name] = stored.clone()
                    if tensors[name] is not stored:
                        copied += stored.nbytes
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}); copy or download it again"
        ) from error
    return tensors


def cast(
    name: str, tensor: Tensor, dtype: torch.dtype | None, keep: Collection[str] = ()
) -> Tensor:
    """A floating-point tensor in `dtype` (None: its own), or in fp32 if `keep` has its name."""
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float32 if name in keep else dtype)


def save_stage(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write one stage's folder, whole or not at all.

    Args:
        folder: where to.
        config: plain values, with a `stage` key that says what the folder holds.
        tensors: the state dict.
        dtype: of the stored weights; None keeps each tensor's own.
        more: writes what else belongs into the folder it is given.
    """
    with written_whole(folder) as temporary:
        (temporary / CONFIG_NAME).write_text(yaml.safe_dump(dict(config), sort_keys=False))
        save_weights(tensors, temporary / WEIGHTS_NAME, dtype)
        if more is not None:
            more(temporary)


def load_stage(
    folder: Path, stage: str, dtype: torch.dtype = torch.float32, keep: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read one stage's folder: its config (without the `stage` key) and its tensors, of which
    `dtype` and `keep` are as `load_weights` has them.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: it holds another kind of stage, or a damaged file.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} holds no {stage}")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    found = config.pop("stage", None) if isinstance(config, dict) else None
    if found != stage:
        raise ValueError(
            f"{path} must describe the stage {stage!r}; got {found!r}: pass another folder"
        )
    return config, load_weights(Path(folder) / WEIGHTS_NAME, dtype, keep)


def unfilled(make: Callable[[], Module]) -> Module:
    """What `make` makes, its weights yet without memory or value: `fill` puts them there."""
    with torch.device("meta"):
        return make()


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    left: Collection[str] = (),
) -> None:
    """Make tensors the weights of a module, as they are; none may be missing, left over or
    misshapen.

    Args:
        module: what to fill; often `unfilled`.
        tensors: its state dict.
        source: where they came from, for the error.
        left: names in a checkpoint of another format that its conversion has not understood.

    Raises:
        ValueError: naming the first five tensors and the likely cause.
    """
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    extra = sorted({*left, *(set(tensors) - set(wanted))})
    shapes = [
        f"{name} {list(tensors[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    for fault, names, cause in (
        ("lacks", missing, "it is not whole, or its config is another model's"),
        ("has no place for", extra, "its config is another model's"),
        ("has other shapes than its config says:", shapes, "its config is another model's"),
    ):
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            raise ValueError(
                f"{source} {fault} {listed} of the {type(module).__name__}: {cause}; copy or "
                "download it again"
            )
    own: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        # A file may hold one tensor under two names; in the module each is to be trained alone.
        own[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(own[name].data_ptr())
    module.load_state_dict(own, assign=True)
