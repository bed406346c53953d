"""Captions with weights: `a red circle::2 a blue square::1` is two captions, blended where CLIP's
numbers for them lie.

Shapes: K captions, N tokens, W width of the text encoder, D width of the joint space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from unclip.clip.frozen import Text

_WEIGHT = re.compile(r"::(\S*)")


def split_weights(prompt: str) -> list[tuple[str, float]]:
    """The captions of a prompt and their weights: each caption is followed by `::` and a number;
    the last one's may be left out and is 1 then. A prompt without `::` is one caption.

    Raises:
        ValueError: a caption is empty, or a weight is not a number above 0.
    """
    words = _WEIGHT.split(prompt)  # caption, weight, caption, weight, ..., what is left
    captions, weights = words[::2], words[1::2]
    if len(captions) > 1 and not captions[-1].strip():
        captions.pop()
    else:
        weights.append("1")
    parts = []
    for caption, weight in zip(captions, weights, strict=True):
        try:
            value = float(weight)
        except ValueError:
            value = float("nan")
        if not 0 < value < float("inf") or not caption.strip():
            raise ValueError(
                "a weighted prompt must be captions, each with '::' and a number above 0 behind "
                f"it; got {weight!r} behind {caption.strip()!r} in {prompt!r}: write "
                "'a red circle::2 a blue square::1', and what to stay away from as a negative "
                "prompt"
            )
        parts.append((caption.strip(), value))
    return parts


def blend(text: Text, weights: Sequence[float], unit_norm: bool) -> Text:
    """One conditioning of K captions': the weighted mean of their embeddings, and token by token
    that of the encodings of those captions which have a token there.

    Args:
        text: of K captions.
        weights: K numbers above 0.
        unit_norm: whether the CLIP's embeddings have unit norm; the blend gets it too.

    Returns:
        `text_embed` [1, D], `text_encodings` [1, N, W], `text_mask` [1, N].
    """
    weight = torch.tensor(weights, device=text.text_embed.device)
    weight = (weight / weight.sum())[:, None]  # [K, 1]
    embed = (weight * text.text_embed).sum(0, keepdim=True)
    share = weight * text.text_mask  # [K, N]
    encodings = torch.einsum("kn,knw->nw", share, text.text_encodings)
    encodings = encodings / share.sum(0).clamp(min=1e-9)[:, None]
    embed = F.normalize(embed, dim=-1) if unit_norm else embed
    return Text(embed, encodings[None], text.text_mask.any(0, keepdim=True))
