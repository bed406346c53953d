"""What the cascade asks of a prior, whatever kind it is.

Shapes: B captions, N text tokens, W text width, D width of CLIP's joint space, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class TextConditioning(Protocol):
    """What CLIP says of B captions (`unclip.clip.Text` is one)."""

    @property
    def text_embed(self) -> Tensor:
        """[B, D] embedding in the joint space."""

    @property
    def text_encodings(self) -> Tensor:
        """[B, N, W] hidden states."""

    @property
    def text_mask(self) -> Tensor:
        """[B, N] bool, True = keep."""


class Prior(Protocol):
    """Draws image embeddings for captions."""

    def sample(
        self,
        text: TextConditioning,
        *,
        guidance_scale: float = 1.0,
        num_candidates: int = 2,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Image embeddings [B, D], one for each caption; one generator a caption."""


def best_candidate(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """Of K candidates for each caption keep the one closest to its text (paper, section 2.2).

    Args:
        image_embed: [B, K, D] candidates z_i.
        text_embed: [B, D] embeddings z_t.

    Returns:
        [B, D]: for each caption the candidate with the highest dot product z_i . z_t.
    """
    score = torch.einsum("bkd,bd->bk", image_embed, text_embed)
    return image_embed[torch.arange(len(image_embed)), score.argmax(dim=1)]
