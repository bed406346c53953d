"""What every frozen CLIP is to the stages that stand on it: captions and pictures in, embeddings
out.

Shapes: B captions or pictures, N text tokens, W width of the text encoder, D width of the joint
space.
"""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

CUTS_NAMED = 10
"""Over-long captions that are warned of one by one: a data set may be full of them."""


class Text(NamedTuple):
    """What CLIP says of B captions; every stage's text conditioning."""

    text_embed: Tensor
    """[B, D] embedding in the joint space, of unit norm if the CLIP's `unit_norm` says so."""
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


class FrozenCLIP(nn.Module, ABC):
    """A CLIP in eval mode without gradients, with the tokenizer that belongs to it.

    Attributes:
        name: what it was loaded from.
        embed_dim: D. text_width: W. context_length: N. image_size: side its image tower wants, px;
            None where there is no image tower.
        unit_norm: whether its embeddings have unit norm.
        logit_scale: what it multiplies cosines by before the softmax over captions; OpenAI's 100
            where a checkpoint holds none, as those without the contrastive head do.
    """

    mean: Tensor
    std: Tensor
    unit_norm: bool
    logit_scale: float = 100.0

    def __init__(
        self,
        name: str,
        *,
        embed_dim: int,
        text_width: int,
        context_length: int,
        image_size: int | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.name = name
        self.embed_dim, self.text_width = embed_dim, text_width
        self.context_length, self.image_size = context_length, image_size
        self.num_cut = 0
        # Pictures arrive in [-1, 1]: fold that into the mean and std CLIP was trained with.
        self.register_buffer("mean", (2 * torch.tensor(mean) - 1).view(1, 3, 1, 1), False)
        self.register_buffer("std", (2 * torch.tensor(std)).view(1, 3, 1, 1), False)

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stay in eval mode whatever happens to the module that holds this one."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @abstractmethod
    def cut_text(self, caption: str) -> str:
        """The end of a caption that does not fit the text encoder ("" when all of it fits)."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Text:
        """Encode B captions on the model's device; outputs are fp32. Too long ones are cut, and
        the first ten are warned of with what was cut.

        Raises:
            TypeError: a caption is not a string.
        """

    @abstractmethod
    def _image_features(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of normalised pictures of `image_size`."""

    @abstractmethod
    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the CLIP into an empty folder that `load_clip` reads."""

    def null_text(self, kind: str) -> Text | None:
        """What stands for no caption in a network of that `null_text`: the empty prompt's encoding
        for `empty_prompt`, None where it has `learned` its own."""
        return self.encode_text([""]) if kind == "empty_prompt" else None

    def check_captions(self, captions: Sequence[str]) -> None:
        """Raise TypeError for what is not text; warn of what will be cut."""
        for caption in captions:
            if not isinstance(caption, str):
                raise TypeError(f"captions must be strings; got {type(caption).__name__}")
            if cut := self.cut_text(caption):
                self.num_cut += 1
                said = f"the caption has more than {self.context_length} tokens; cut off: {cut!r}"
                if self.num_cut == CUTS_NAMED:
                    said += "; further captions are cut without a word"
                if self.num_cut <= CUTS_NAMED:
                    warnings.warn(said, stacklevel=4)

    def required_image_size(self) -> int:
        """Side its image tower wants, px; raises ValueError where it has none."""
        if self.image_size is None:
            raise ValueError(
                f"the CLIP {self.name} has no image tower, as text-to-image checkpoints often do: "
                "take the one it was trained with, image encoder included"
            )
        return self.image_size

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Embed pictures [B, 3, H, W] in [-1, 1] as [B, D], fp32.

        Raises:
            ValueError: the CLIP has no image tower, or `images` is not [B, 3, H, W].
        """
        side = self.required_image_size()
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
            images = images.clamp(-1, 1)
        features = self._image_features((images - self.mean) / self.std).float()
        return F.normalize(features, dim=-1) if self.unit_norm else features

    def encode_rows(
        self, dataset: Dataset[Any], rows: Sequence[int], batch_size: int = 64
    ) -> Tensor:
        """Embed the pictures of some rows of a data set as [len(rows), D], a few at a time: a data
        set's pictures do not fit into memory together; see `encode_samples`."""
        fetch = getattr(dataset, "__getitems__", lambda rows: [dataset[row] for row in rows])
        embeds = []
        for start in range(0, len(rows), batch_size):
            embeds.append(self.encode_samples(fetch(rows[start : start + batch_size])))
        return torch.cat(embeds)

    def encode_samples(self, samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """Embed the pictures of a data set's samples as [len(samples), D]; those that bring an
        `image_embed` [D] are taken by their word."""
        if "image_embed" in samples[0]:
            brought = torch.stack([sample["image_embed"] for sample in samples])
            return brought.float().to(self.device)
        images = torch.stack([sample["image"] for sample in samples])
        return self.encode_image(images.to(self.device))

    def fingerprint(self, tower: Literal["both", "text"] = "both") -> str:
        """A short hash of the weights, or of the text tower's alone, to tell two CLIPs of one shape
        apart."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._weights().items()):
            if tower == "text" and name.startswith(("visual.", "image.")):
                continue
            sample = tensor.flatten()[:64].half().cpu().numpy().tobytes()
            digest.update(name.encode() + sample)
        return digest.hexdigest()[:16]

    @abstractmethod
    def _weights(self) -> dict[str, Any]:
        """The state dict that the fingerprint is taken of."""
