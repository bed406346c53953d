"""Where training pictures come from: one config, one function, chosen by what `data` names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from unclip.data.captioned import CaptionedConfig, CaptionedDataset
from unclip.data.embeddings import EmbeddingDataset, is_embedding_folder
from unclip.data.images import WHITE
from unclip.data.shapes import ShapesConfig, ShapesDataset


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Captioned pictures, drawn or read."""

    data: str = "shapes"
    """`shapes` for the built-in world; else WebDataset tars (a path, a glob, a brace range), a
    folder of captioned pictures, a Hub data set `org/name`, or, for the prior, a folder of
    embeddings (`img_emb/` and `metadata/`)."""
    image_size: int = 64
    """Pictures are resized and centre-cropped to this side, px."""
    crop_size: int | None = None
    """Side of a random crop of that picture, px, for training upsamplers."""
    caption_key: str = "txt"
    """Tars: the extension that holds the caption, or a key of the json as in `json.caption`."""
    image_column: str | None = None
    """Hub data sets: the column of pictures; None finds it."""
    caption_column: str | None = None
    """Hub data sets and caption files: the column of captions; None finds it."""
    split: str = "train"
    """Split of a Hub data set."""
    background: tuple[int, int, int] = WHITE
    """What transparent pictures are laid over, 0 to 255."""
    limit: int | None = None
    """Use only the first so many samples: to see whether a network can learn them by heart."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    """Which scenes, when `data` is `shapes`; sizes are taken from above."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"source.limit must be at least 1; got {self.limit}: use 256 or null")


class FirstSamples(Dataset[dict[str, Any]]):
    """The first `count` samples of a data set, or all of them where there are fewer."""

    def __init__(self, dataset: Dataset[dict[str, Any]], count: int) -> None:
        self.dataset = dataset
        self.count = min(count, len(dataset))  # type: ignore[arg-type]
        self.varies_by_epoch = getattr(dataset, "varies_by_epoch", False)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if (index[0] if isinstance(index, tuple) else index) >= self.count:
            raise IndexError(f"sample {index} of {self.count}")
        return self.dataset[index]


def open_source(config: SourceConfig) -> Dataset[dict[str, Any]]:
    """The data set that `config` names.

    Its samples are dicts of ``image`` [3, S, S] in [-1, 1], ``caption`` and ``key``; those of a
    folder of embeddings of ``image_embed`` [D] and ``caption``.

    Raises:
        FileNotFoundError, ValueError: as `CaptionedDataset` and `EmbeddingDataset` do.
    """
    dataset = _open(config)
    if config.limit is None:
        return dataset
    return FirstSamples(dataset, config.limit)


def _open(config: SourceConfig) -> Dataset[dict[str, Any]]:
    size: dict[str, Any] = {"image_size": config.image_size, "crop_size": config.crop_size}
    if config.data == "shapes":
        return ShapesDataset(replace(config.shapes, **size))
    if is_embedding_folder(config.data):
        return EmbeddingDataset(Path(config.data), config.caption_column)
    return CaptionedDataset(
        CaptionedConfig(
            data=config.data,
            caption_key=config.caption_key,
            image_column=config.image_column,
            caption_column=config.caption_column,
            split=config.split,
            background=config.background,
            **size,
        )
    )
