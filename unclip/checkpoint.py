"""A stage on disk: a folder with `config.yaml` (plain text) and `model.safetensors`, no pickle."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG_NAME = "config.yaml"
WEIGHTS_NAME = "model.safetensors"


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


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the folder is not a whole stage; copy it again"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}); copy or download it again"
        ) from error


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


def load_stage(folder: Path, stage: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read one stage's folder: its config (without the `stage` key) and its tensors in fp32.

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
    tensors = load_weights(Path(folder) / WEIGHTS_NAME)
    return config, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Load tensors into a module; every name and every shape must match.

    Raises:
        ValueError: naming the first tensors that are missing, left over or of another shape.
    """
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {folder} do not fit the {type(module).__name__} its config describes: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
