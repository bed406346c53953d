"""Files of torch.save, read without running what is in them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SUFFIXES = (".pt", ".pth", ".ckpt", ".th", ".bin")


def load_pickle(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """What a file of torch.save holds, tensors mapped into memory rather than read.

    Args:
        path: the file.
        allowed: classes beside tensors and plain containers that it may hold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or holds objects that only running its code could bring back.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy or download it again")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                # The format from before torch 1.6 cannot be mapped.
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = str(error).split("Please")[0].split("WeightsUnpickler error:")[-1]
        raise ValueError(
            f"{path} holds more than tensors and is not read, because that would run its code: "
            f"{' '.join(asked.split())[:300]}. Save its state dict alone, from a program you trust"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is truncated or damaged ({reason}); download it again") from error
