"""CLIP through open_clip: its models and tags, folders in its layout, and new small ones."""

from __future__ import annotations

import difflib
import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from torch import Tensor, nn

from unclip.checkpoint import save_weights
from unclip.clip.frozen import FrozenCLIP, Text

BPE_NAME = "bpe_vocabulary.txt.gz"
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


class OpenCLIP(FrozenCLIP):
    """An open_clip model. Its embeddings are put on the unit sphere, as it compares them, unless
    `unit_norm` is set to false for stages that were trained on them as they come."""

    unit_norm = True

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        visual: Any = model.visual
        size = visual.image_size
        preprocess = getattr(visual, "preprocess_cfg", {})
        context_length = int(tokenizer.context_length)
        with torch.no_grad():
            empty = _forward_text(model.eval(), tokenizer([""]))
        super().__init__(
            name,
            embed_dim=empty["text_features"].shape[1],
            text_width=empty["text_intermediates"][-1].shape[2],
            context_length=context_length,
            image_size=int(size[0] if isinstance(size, (tuple, list)) else size),
            mean=preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN),
            std=preprocess.get("std", open_clip.OPENAI_DATASET_STD),
        )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        if (scale := getattr(model, "logit_scale", None)) is not None:
            self.logit_scale = float(scale.exp())

    def cut_text(self, caption: str) -> str:
        """The end of a caption that does not fit the text encoder ("" when all of it fits)."""
        room = self.context_length - 2  # start and end tokens
        # A token covers at least one byte: short captions need no second tokenisation.
        if len(caption.encode()) <= room or not hasattr(self.tokenizer, "encode"):
            return ""
        tokens = self.tokenizer.encode(caption)
        return self.tokenizer.decode(tokens[room:]).strip() if len(tokens) > room else ""

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        """Encode B captions on the model's device; outputs are fp32, embeddings of unit norm."""
        self.check_captions(captions)
        tokens = self.tokenizer(list(captions)).to(self.device)
        out = _forward_text(self.model, tokens)
        encodings = out["text_intermediates"][-1]
        # The end token has the highest id; open_clip pads with zeros behind it, and the start
        # token keeps the mask from ever being empty.
        length = tokens.argmax(dim=1, keepdim=True)
        mask = torch.arange(tokens.shape[1], device=tokens.device)[None] <= length
        embed = out["text_features"].float()
        embed = F.normalize(embed, dim=-1) if self.unit_norm else embed
        return Text(embed, encodings.float(), mask)

    def _image_features(self, images: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        features: Tensor = self.model.encode_image(images.to(dtype))  # type: ignore[operator]
        return features

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder in open_clip's layout; the CLIP must have come from one."""
        for name in (CONFIG_NAME, BPE_NAME):
            if (source := Path(self.name) / name).is_file():
                (folder / name).write_bytes(source.read_bytes())
        save_weights(self.model.state_dict(), folder / WEIGHTS_NAME, dtype)

    def _weights(self) -> dict[str, Any]:
        return self.model.state_dict()


def _forward_text(model: Any, tokens: Tensor) -> dict[str, Any]:
    out: dict[str, Any] = model.forward_intermediates(
        text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
    )
    return out


def load_openclip(name: str) -> OpenCLIP:
    """Load a folder in open_clip's layout, `hf-hub:org/name`, or a model and pretrained tag as
    `ViT-L-14/openai`.

    Raises:
        ValueError: no such model or tag, with the nearest that there is; or a damaged folder.
        FileNotFoundError: a folder that is no CLIP, or a CLIP that cannot be fetched.
    """
    if (folder := Path(name)).is_dir():
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"{folder} is no CLIP folder: {CONFIG_NAME} is missing from it")
        weights = folder / WEIGHTS_NAME
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing: copy the CLIP folder again")
        source = f"local-dir:{folder}"
        bpe = folder / BPE_NAME
        extra = {"bpe_path": str(bpe)} if bpe.is_file() else {}
        try:
            with _quiet():
                model = open_clip.create_model(source)
                tokenizer = open_clip.get_tokenizer(source, **extra)
        except Exception as error:
            raise ValueError(f"the CLIP in {folder} cannot be loaded: {error}") from error
        return OpenCLIP(model, tokenizer, name)
    if name.startswith("hf-hub:"):
        return _fetched(name, name, None)
    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        near = difflib.get_close_matches(architecture, open_clip.list_models(), 1) or ["ViT-L-14"]
        raise ValueError(
            f"clip must be a folder, hf-hub:org/name, or an open_clip model/tag; got {name!r}: "
            f"for example {near[0]}/{tag or 'openai'}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        raise ValueError(f"open_clip has no weights {tag!r} for {architecture}: use {sorted(tags)}")
    return _fetched(name, architecture, tag)


def _fetched(name: str, architecture: str, tag: str | None) -> OpenCLIP:
    """A CLIP of open_clip's, from its cache or the Hub."""
    try:
        model = open_clip.create_model(architecture, pretrained=tag)
        return OpenCLIP(model, open_clip.get_tokenizer(architecture), name)
    except (OSError, RuntimeError) as error:  # no network, no such repository; a download cut short
        reason = str(error).strip().split("\n")[0][:200]
        raise FileNotFoundError(
            f"the CLIP {name} is not on this computer and cannot be fetched ({reason}): connect to "
            "the network once, or name a folder that holds it"
        ) from error


def new_clip(model_cfg: dict[str, Any], vocabulary: Path) -> tuple[nn.Module, SimpleTokenizer]:
    """A CLIP of open_clip's own classes at random weights, and a tokenizer over `vocabulary`.

    Args:
        model_cfg: open_clip's `embed_dim`, `vision_cfg`, `text_cfg`.
        vocabulary: byte-pair merges in open_clip's format, see `write_vocabulary`.
    """
    tokenizer = SimpleTokenizer(
        str(vocabulary), context_length=model_cfg["text_cfg"]["context_length"]
    )
    text_cfg = {**model_cfg["text_cfg"], "vocab_size": tokenizer.vocab_size}
    return open_clip.CLIP(**{**model_cfg, "text_cfg": text_cfg}), tokenizer


def write_vocabulary(path: Path, num_merges: int) -> None:
    """Write the first `num_merges` merges of CLIP's own byte-pair vocabulary to `path` (.gz).

    A token table for all 49,408 entries would be larger than the rest of a small CLIP.
    """
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    # mtime 0 keeps the file the same from run to run.
    path.write_bytes(gzip.compress("\n".join(lines[: num_merges + 1]).encode(), mtime=0))


def write_clip_config(folder: Path, model_cfg: dict[str, Any], vocab_size: int) -> None:
    """Write `open_clip_config.json`, which makes a folder one that open_clip itself can load."""
    text_cfg = {**model_cfg["text_cfg"], "vocab_size": vocab_size}
    size = model_cfg["vision_cfg"]["image_size"]
    config = {
        "model_cfg": {**model_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": {
            "size": [size, size],
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


class _quiet:
    """open_clip logs each load at INFO through the root logger; keep a user's terminal clean."""

    def __enter__(self) -> None:
        self.level = logging.getLogger().level
        logging.getLogger().setLevel(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self.level)
