"""The frozen CLIP: captions and pictures in, embeddings out, through open_clip.

Shapes: B captions or pictures, N text tokens, W width of the text encoder, D width of the joint
space. CLIP is never trained by the stages that stand on it; `unclip.training.clip` trains a small
one for use where nothing can be downloaded.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from torch import Tensor, nn
from torch.utils.data import Dataset

log = logging.getLogger(__name__)

BPE_NAME = "bpe_vocabulary.txt.gz"
CUTS_NAMED = 10
"""Over-long captions that are warned of one by one: a data set may be full of them."""


class Text(NamedTuple):
    """What CLIP says of B captions; every stage's text conditioning."""

    text_embed: Tensor
    """[B, D] embedding in the joint space, unit norm."""
    text_encodings: Tensor
    """[B, N, W] the text encoder's last hidden states after its final LayerNorm."""
    text_mask: Tensor
    """[B, N] bool, True = a token of the caption, False = padding."""

    def trimmed(self) -> Text:
        """Without the padding that all captions share."""
        longest = int(self.text_mask.sum(dim=1).max())
        return Text(self.text_embed, self.text_encodings[:, :longest], self.text_mask[:, :longest])

    def rows(self, rows: Any) -> Text:
        """The same three tensors for some of the captions."""
        return Text(*(tensor[rows] for tensor in self))


class FrozenCLIP(nn.Module):
    """An open_clip model in eval mode without gradients, with the tokenizer that belongs to it.

    Attributes:
        name: what it was loaded from.
        embed_dim: D. text_width: W. context_length: N. image_size: side its image tower wants, px.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        visual: Any = model.visual
        size = visual.image_size
        self.image_size = int(size[0] if isinstance(size, (tuple, list)) else size)
        preprocess = getattr(visual, "preprocess_cfg", {})
        mean = preprocess.get("mean", open_clip.OPENAI_DATASET_MEAN)
        std = preprocess.get("std", open_clip.OPENAI_DATASET_STD)
        # Pictures arrive in [-1, 1]: fold that into the mean and std CLIP was trained with.
        self.register_buffer("mean", (2 * torch.tensor(mean) - 1).view(1, 3, 1, 1), False)
        self.register_buffer("std", (2 * torch.tensor(std)).view(1, 3, 1, 1), False)
        self.context_length = int(tokenizer.context_length)
        self.num_cut = 0
        empty = self.encode_text([""])
        self.embed_dim = empty.text_embed.shape[1]
        self.text_width = empty.text_encodings.shape[2]

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stay in eval mode whatever happens to the module that holds this one."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids [B, N] of captions; too long ones are cut, and the first ten are warned of
        with what was cut.

        Raises:
            TypeError: a caption is not a string.
        """
        for caption in captions:
            if not isinstance(caption, str):
                raise TypeError(f"captions must be strings; got {type(caption).__name__}")
            if cut := self.cut_text(caption):
                self.num_cut += 1
                said = f"the caption has more than {self.context_length} tokens; cut off: {cut!r}"
                if self.num_cut == CUTS_NAMED:
                    said += "; further captions are cut without a word"
                if self.num_cut <= CUTS_NAMED:
                    warnings.warn(said, stacklevel=3)
        return self.tokenizer(list(captions)).to(self.device)

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
        """Encode B captions on the model's device; outputs are fp32."""
        tokens = self.tokenize(captions)
        out = self.model.forward_intermediates(  # type: ignore[operator]
            text=tokens, text_indices=1, normalize=False, normalize_intermediates=True
        )
        encodings = out["text_intermediates"][-1]
        # The end token has the highest id; open_clip pads with zeros behind it, and the start
        # token keeps the mask from ever being empty.
        length = tokens.argmax(dim=1, keepdim=True)
        mask = torch.arange(tokens.shape[1], device=tokens.device)[None] <= length
        return Text(F.normalize(out["text_features"].float(), dim=-1), encodings.float(), mask)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Embed pictures [B, 3, H, W] in [-1, 1] as [B, D], unit norm, fp32."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(
                images, (self.image_size, self.image_size), mode="bicubic", antialias=True
            ).clamp(-1, 1)
        images = (images - self.mean) / self.std
        dtype = next(self.model.parameters()).dtype
        features = self.model.encode_image(images.to(dtype))  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    def encode_rows(
        self, dataset: Dataset[Any], rows: Sequence[int], batch_size: int = 64
    ) -> Tensor:
        """Embed the pictures of some rows of a data set as [len(rows), D], a few at a time: a data
        set's pictures do not fit into memory together."""
        fetch = getattr(dataset, "__getitems__", lambda rows: [dataset[row] for row in rows])
        embeds = []
        for start in range(0, len(rows), batch_size):
            samples = fetch(rows[start : start + batch_size])
            images = torch.stack([sample["image"] for sample in samples])
            embeds.append(self.encode_image(images.to(self.device)))
        return torch.cat(embeds)

    def fingerprint(self) -> str:
        """A short hash of the weights, to tell two CLIPs of one shape apart."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            sample = tensor.flatten()[:64].half().cpu().numpy().tobytes()
            digest.update(name.encode() + sample)
        return digest.hexdigest()[:16]


def load_clip(name: str, device: str | torch.device = "cpu") -> FrozenCLIP:
    """Load a CLIP by name.

    Args:
        name: a folder in open_clip's layout, `hf-hub:org/name`, or an open_clip model and
            pretrained tag as `ViT-L-14/openai`.
        device: where to put it.

    Raises:
        ValueError: no such model or tag, with the nearest that there is.
        FileNotFoundError: a folder that is no CLIP.
    """
    if (folder := Path(name)).is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise FileNotFoundError(
                f"{folder} is no CLIP folder: open_clip_config.json is missing from it"
            )
        weights = folder / "open_clip_model.safetensors"
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
        return FrozenCLIP(model, tokenizer, name).to(device)
    if name.startswith("hf-hub:"):
        model = open_clip.create_model(name)
        return FrozenCLIP(model, open_clip.get_tokenizer(name), name).to(device)
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
    model = open_clip.create_model(architecture, pretrained=tag)
    return FrozenCLIP(model, open_clip.get_tokenizer(architecture), name).to(device)


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
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


class _quiet:
    """open_clip logs each load at INFO through the root logger; keep a user's terminal clean."""

    def __enter__(self) -> None:
        self.level = logging.getLogger().level
        logging.getLogger().setLevel(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self.level)
