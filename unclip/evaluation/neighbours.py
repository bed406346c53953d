"""The nearest real picture to a drawn one: is it new, or remembered?

Shapes: N drawn pictures, M of the reference, D width of an encoder's features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from unclip.config import from_dict
from unclip.evaluation.captions import Item
from unclip.evaluation.measuring import reference_ids
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.references import RealPictures
from unclip.evaluation.results import Result

FIRST = "clip"
"""Whose features say what is near, where it is left open and they are there."""


class Neighbours:
    """The nearest picture of a reference set, by the cosine of an encoder's features."""

    def __init__(
        self,
        features: np.ndarray,
        reference: np.ndarray,
        read: Callable[[int], Image.Image],
    ) -> None:
        """Take features [N, D] and [M, D], and what reads a picture of the reference by its row."""
        self.features, self.reference = _unit(features), _unit(reference)
        self.read = read

    def to(self, row: int) -> tuple[Image.Image, float]:
        """The nearest to drawn picture `row`, and its cosine."""
        cosines = self.reference @ self.features[row]
        nearest = int(cosines.argmax())
        return self.read(nearest), float(cosines[nearest])


def neighbours_of(result: Result, encoder: str | None = None) -> Neighbours:
    """The neighbours of a result's pictures in its protocol's reference set.

    Args:
        result: what was drawn.
        encoder: whose features say what is near; None: CLIP's, or the first that has a reference.

    Raises:
        FileNotFoundError: the encoder's features are not there, or the reference set.
        ValueError: no encoder has features of the reference, or it is another set than was
            measured.
    """
    names = [encoder] if encoder else sorted(result.encoders, key=lambda name: name != FIRST)
    for name in names:
        features, reference = result.features(name)
        if reference is not None:
            return Neighbours(features, reference, _reader(result, len(reference)))
    raise ValueError(
        f"neighbours need an encoder's features of the reference; {result.folder} has those of "
        f"{', '.join(names) or 'none'}, without one: leave them out, or measure fd_clip too"
    )


def _reader(result: Result, count: int) -> Callable[[int], Image.Image]:
    protocol = from_dict(Protocol, dict(result.protocol))
    config = protocol.reference
    if config.data is None:
        raise ValueError(f"reference.data of {result.folder} names no pictures: leave them out")
    with Image.open(result.samples[0].path) as picture:
        side = picture.width
    pictures = RealPictures(config.data, protocol.captions, side)
    items = [Item(id=sample.id, caption=sample.caption) for sample in result.samples]
    ids = reference_ids(protocol, pictures, items)
    if len(ids) != count:
        raise ValueError(
            f"reference.data must hold the {count} pictures that were measured; got {len(ids)} in "
            f"{config.data!r}: bring them back, or leave the neighbours out"
        )
    return lambda row: Image.fromarray(pictures.read(ids[row]).permute(1, 2, 0).numpy())


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
