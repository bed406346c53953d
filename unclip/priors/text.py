"""A caption's conditioning as the stages take it, and what stands for no caption.

Shapes: B captions, N text tokens, W text width, D width of CLIP's joint space.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
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

    def rows(self, rows: Tensor) -> TextConditioning:
        """The conditioning of some of the captions, by their numbers."""


class FilledText(NamedTuple):
    """A text conditioning put together of two."""

    text_embed: Tensor
    text_encodings: Tensor
    text_mask: Tensor

    def rows(self, rows: Tensor) -> FilledText:
        """The conditioning of some of the captions, by their numbers."""
        return FilledText(*(part[rows] for part in self))


def fill_dropped(
    text: TextConditioning, dropped: Tensor | None, empty: TextConditioning | None
) -> TextConditioning:
    """The conditioning with the empty prompt's in the rows that `dropped` [B] marks.

    For networks whose `null_text` is `empty_prompt`.

    Args:
        text: of B captions, N tokens each.
        dropped: bool, True = the row gets the empty prompt; None: none does.
        empty: of one empty prompt; its padding is fitted to N tokens.

    Raises:
        ValueError: a row is dropped and there is no `empty`.
    """
    if dropped is None:
        return text
    if empty is None:
        raise ValueError(
            "dropping captions needs the empty prompt where null_text is 'empty_prompt'; got None: "
            'pass empty=clip.encode_text([""])'
        )
    num_tokens = text.text_encodings.shape[1]
    missing = max(0, num_tokens - empty.text_encodings.shape[1])
    encodings = F.pad(empty.text_encodings[:, :num_tokens], (0, 0, 0, missing))
    mask = F.pad(empty.text_mask[:, :num_tokens], (0, missing), value=False)
    return FilledText(
        torch.where(dropped[:, None], empty.text_embed, text.text_embed),
        torch.where(dropped[:, None, None], encodings, text.text_encodings),
        torch.where(dropped[:, None], mask, text.text_mask),
    )
