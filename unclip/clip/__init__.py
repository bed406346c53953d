"""The frozen CLIP that every stage stands on: captions and pictures in, embeddings out.

It is never trained by the stages; `unclip.training.clip` trains a small one for use where nothing
can be downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch

from unclip.clip.blend import blend, split_weights
from unclip.clip.frozen import FrozenCLIP, Text
from unclip.clip.huggingface import HuggingFaceCLIP, load_huggingface
from unclip.clip.openclip import (
    BPE_NAME,
    CONFIG_NAME,
    OpenCLIP,
    load_openclip,
    new_clip,
    write_clip_config,
    write_vocabulary,
)

__all__ = [
    "BPE_NAME",
    "FrozenCLIP",
    "HuggingFaceCLIP",
    "OpenCLIP",
    "Text",
    "blend",
    "is_clip_folder",
    "load_clip",
    "load_openclip",
    "new_clip",
    "split_weights",
    "write_clip_config",
    "write_vocabulary",
]


def is_clip_folder(folder: Path) -> bool:
    """Whether a folder is a CLIP that `load_clip` reads."""
    return any((folder / name).exists() for name in (CONFIG_NAME, "text_encoder"))


def load_clip(name: str, device: str | torch.device = "cpu") -> FrozenCLIP:
    """Load a CLIP by name.

    Args:
        name: a folder in open_clip's layout, or with transformers' `text_encoder` and `tokenizer`;
            `hf-hub:org/name`; or an open_clip model and pretrained tag as `ViT-L-14/openai`.
        device: where to put it.

    Raises:
        ValueError: no such model or tag, with the nearest that there is; or a damaged folder.
        FileNotFoundError: a folder that is no CLIP.
    """
    is_huggingface = (Path(name) / "text_encoder").is_dir()
    return (load_huggingface(Path(name)) if is_huggingface else load_openclip(name)).to(device)
