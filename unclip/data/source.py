"""Where training pictures come from: one config, one function, chosen by what `data` names."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from unclip.data.captioned import CaptionedConfig, CaptionedDataset
from unclip.data.embeddings import EmbeddingDataset, is_embedding_folder
from unclip.data.filters import Filter
from unclip.data.images import MAX_PIXELS, WHITE
from unclip.data.order import Shards
from unclip.data.shapes import ShapesConfig, ShapesDataset


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """One source of a mixture. What is None is as the mixture's own settings say."""

    data: str
    """Tars, a folder, Parquet files or a Hub data set."""
    weight: float = 1.0
    """Share of the training samples that come from here, in any unit common to the parts."""
    caption_key: str | None = None
    """Tars: the extension or key of the json that holds the caption."""
    image_column: str | None = None
    """Tables: the column of pictures."""
    caption_column: str | None = None
    """Tables: the column of captions."""
    split: str | None = None
    """Split of a Hub data set."""
    where: str | None = None
    """A filter of this part alone."""
    stream: bool | None = None
    """Whether its tars are read one after another."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(
                f"weight must be above 0; got {self.weight} for {self.data!r}: use 1, or leave "
                "that source out"
            )


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Captioned pictures, drawn or read."""

    data: str = "shapes"
    """`shapes` for the built-in world; else WebDataset tars or Parquet files (a path, a glob, a
    brace range, an address such as `hf://datasets/org/name/*.tar`), a folder of captioned pictures,
    a Hub data set `org/name`, or, for the prior, a folder of embeddings (`img_emb/` and
    `metadata/`)."""
    mix: list[PartConfig] | None = None
    """Several sources mixed by weight, in place of `data`: a list of `data`, `weight` and what else
    differs."""
    image_size: int = 64
    """Pictures are resized and centre-cropped to this side, px."""
    crop_size: int | None = None
    """Side of a random crop of that picture, px, for training upsamplers."""
    caption_key: str = "txt"
    """Tars: the extension that holds the caption, or a key of the json as in `json.caption`."""
    caption_choice: Literal["first", "random"] = "first"
    """Of several captions of a picture: the first, or one drawn each epoch."""
    image_column: str | None = None
    """Hub data sets: the column of pictures; None finds it."""
    caption_column: str | None = None
    """Hub data sets and caption files: the column of captions; None finds it."""
    split: str = "train"
    """Split of a Hub data set."""
    where: str = ""
    """Which samples to use, by the keys of their json or the columns of their table:
    `aesthetic >= 5 and width >= 256 and language in ["en"]`."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut along a picture's longer side."""
    flip: bool = False
    """Whether every other picture is mirrored; captions that say left and right become wrong."""
    max_aspect: float | None = None
    """Pictures whose longer side is more than so many times the shorter are left out."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are skipped, before they are decoded."""
    max_bad_share: float = 0.5
    """Share of damaged samples, or tars, above which the run stops."""
    background: tuple[int, int, int] = WHITE
    """What transparent pictures are laid over, 0 to 255."""
    stream: bool = False
    """Read tars one after another, from copies on this machine, instead of at offsets where they
    are; compressed tars always are."""
    shuffle_streams: int = 16
    """Of tars that are read one after another, so many at a time, over all machines."""
    shuffle_buffer: int = 10_000
    """In tars that are read one after another, so many samples in a row are shuffled."""
    copies_gb: float = 50.0
    """Room on each machine for copies of tars that are read one after another, GB."""
    index_beside: bool = False
    """Keep the tars' index beside them, where that can be written, instead of in the cache."""
    limit: int | None = None
    """Use only the first so many samples: to see whether a network can learn them by heart."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    """Which scenes, when `data` is `shapes`; sizes are taken from above."""

    def __post_init__(self) -> None:
        if self.where:
            Filter(self.where)  # which says what it does not understand
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"source.limit must be at least 1; got {self.limit}: use 256 or null")
        if self.mix is not None and not self.mix:
            raise ValueError(
                "source.mix must name sources; got an empty list: name one or use data"
            )
        if any(part.data == "shapes" for part in self.mix or []) and self.limit is None:
            raise ValueError(
                "source.mix must name sources that end; got shapes, which has no end: set "
                "source.limit, or draw shapes into tars"
            )

    @property
    def names(self) -> list[str]:
        """What it is read from: `data`, or that of each part of `mix`."""
        return [self.data] if self.mix is None else [part.data for part in self.mix]


class FirstSamples(Dataset[dict[str, Any]]):
    """The first `count` samples of a data set, or all of them where there are fewer."""

    def __init__(self, dataset: Dataset[dict[str, Any]], count: int) -> None:
        self.dataset = dataset
        self.count = min(count, len(dataset))  # type: ignore[arg-type]
        self.varies_by_epoch = getattr(dataset, "varies_by_epoch", False)
        shards: Shards | None = getattr(dataset, "shards", None)
        self.shards = None if shards is None else shards.first(self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> dict[str, Any]:
        if (index[0] if isinstance(index, tuple) else index) >= self.count:
            raise IndexError(f"sample {index} of {self.count}")
        return self.dataset[index]

    def fetch(self, indices: Sequence[int]) -> None:
        self.dataset.fetch(indices)  # type: ignore[attr-defined]

    @property
    def skips(self) -> dict[str, int]:
        return getattr(self.dataset, "skips", {})


class MixedDataset(Dataset[dict[str, Any]]):
    """Several data sets one after another; `weights` say how often each is drawn from in training.

    The keys of all samples are their own data set's.
    """

    def __init__(self, parts: Sequence[Dataset[dict[str, Any]]], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.weights = list(weights)
        self.lengths = [len(part) for part in parts]  # type: ignore[arg-type]
        self.starts = [sum(self.lengths[:k]) for k in range(len(parts))]
        self.varies_by_epoch = any(getattr(part, "varies_by_epoch", False) for part in parts)

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index, *epoch = index if isinstance(index, tuple) else (index,)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        number = bisect.bisect_right(self.starts, index) - 1
        part, within = self.parts[number], index - self.starts[number]
        return part[(within, *epoch) if getattr(part, "varies_by_epoch", False) else within]

    @property
    def skips(self) -> dict[str, int]:
        """Samples found bad while reading, over all parts: cause -> count."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts.update(getattr(part, "skips", {}))
        return dict(counts)


def sources_of(dataset: Dataset[Any]) -> list[Dataset[Any]]:
    """The data sets that one of `open_source` reads from, without its mixing and limits."""
    parts = dataset.parts if isinstance(dataset, MixedDataset) else [dataset]
    return [part.dataset if isinstance(part, FirstSamples) else part for part in parts]


def check_pictures(config: SourceConfig, use: str = "") -> None:
    """Raise ValueError where a source is a folder of embeddings; `use` says what it was wanted for,
    as in `to train a decoder on`."""
    for name in filter(is_embedding_folder, config.names):
        raise ValueError(
            f"source.data must hold pictures{use and ' '}{use}; got {name}, a folder of "
            "embeddings: name what they were made of"
        )


def open_source(config: SourceConfig) -> Dataset[dict[str, Any]]:
    """The data set that `config` names.

    Its samples are dicts of ``image`` [3, S, S] in [-1, 1], ``caption`` and ``key``; those of a
    folder of embeddings of ``image_embed`` [D] and ``caption``.

    Raises:
        FileNotFoundError, ValueError: as `CaptionedDataset` and `EmbeddingDataset` do.
    """
    if config.mix is None:
        return _open(config)
    parts = []
    for part in config.mix:
        own = {f.name: getattr(part, f.name) for f in fields(part) if f.name != "weight"}
        own = {name: value for name, value in own.items() if value is not None}
        parts.append(_open(replace(config, mix=None, **own)))
    return MixedDataset(parts, [part.weight for part in config.mix])


def _open(config: SourceConfig) -> Dataset[dict[str, Any]]:
    size: dict[str, Any] = {"image_size": config.image_size, "crop_size": config.crop_size}
    dataset: Dataset[dict[str, Any]]
    if config.data == "shapes":
        dataset = ShapesDataset(replace(config.shapes, **size))
    elif is_embedding_folder(config.data):
        dataset = EmbeddingDataset(Path(config.data), config.caption_column)
    else:
        names = {f.name for f in fields(CaptionedConfig)} & {f.name for f in fields(config)}
        dataset = CaptionedDataset(CaptionedConfig(**{n: getattr(config, n) for n in names}))
    return dataset if config.limit is None else FirstSamples(dataset, config.limit)
