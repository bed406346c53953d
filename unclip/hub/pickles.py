"""Files of torch.save, read without running what is in them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def load_pickle(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """What a file of torch.save holds, tensors mapped into memory rather than read.

    Args:
        path: the file.
        allowed: what it may hold beside tensors and plain containers, as
            `torch.serialization.safe_globals` takes it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or asks for objects that only running code could bring back.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy or download it again")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            # The format from before torch 1.6 is no zip file and cannot be mapped.
            mmap = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ValueError(
                f"{path} is not a checkpoint of torch, or is damaged: download it again"
            ) from error
        raise ValueError(
            f"{path} asks for {asked[1]}, which could run code, and is not read: save its state "
            "dict alone, in a program you trust it with"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is truncated or damaged ({reason}): download it again") from error
