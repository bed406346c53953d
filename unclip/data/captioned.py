"""Captioned pictures from WebDataset tars, folders, Parquet files and the Hub, as a map-style set.

Tars are indexed once and then read at offsets (`unclip.data.tars`), pictures in folders too; all
else goes through Hugging Face `datasets` (`unclip.data.tables`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from unclip.data.causes import (
    CHANGED,
    CORRUPT,
    TOO_LARGE,
    TOO_LONG,
    UNREACHABLE,
    WHILE_READING,
    Tally,
)
from unclip.data.filters import Filter
from unclip.data.images import MAX_PIXELS, WHITE, PictureTooLarge, decode_image, to_tensor
from unclip.data.order import Shards
from unclip.data.storage import TAR_NAMES, Unreachable, expand
from unclip.data.tables import open_folder, open_hub, open_parquet
from unclip.data.tars import TarRows

logger = logging.getLogger(__name__)

NEIGHBOURS = 8
"""So many samples after a bad one are asked to stand in for it before others are drawn: whole
tars may be bad, and one sample is not to stand in for them all."""


@dataclass(frozen=True, kw_only=True)
class CaptionedConfig:
    """Where captioned pictures come from and the size they get."""

    data: str | list[str]
    """WebDataset tars or Parquet files (a path, a glob, a brace range `{00000..00004}`, an address
    such as `hf://datasets/org/name/*.tar`, or a list of these), a folder of either (img2dataset's
    output, say), a folder of pictures with captions (a .txt beside each, or one of captions.csv,
    captions.jsonl, metadata.csv, metadata.jsonl with file_name and caption), or a Hub data set
    `org/name`."""

    image_size: int = 64
    """Pixels a side: the shorter side is resized to it and the centre square is cut out."""

    caption_key: str = "txt"
    """Tars: the extension that holds the caption, or a key of the json as in `json.caption`. A list
    in the json is several captions of one picture."""

    caption_choice: Literal["first", "random"] = "first"
    """Of several captions: the first, or one drawn each epoch."""

    image_column: str | None = None
    """Hub and Parquet: the column of pictures; None takes the one column of type Image."""

    caption_column: str | None = None
    """Hub, Parquet and caption files: the column of captions; None takes the first of caption,
    text, txt and prompt that is there."""

    split: str = "train"
    """The split of a Hub data set, such as `train` or `train[:1000]`. Unused for local files."""

    where: str = ""
    """Which samples to use, by the keys of their json or the columns of their table:
    `aesthetic >= 5 and width >= 256 and language in ["en"]`; see `unclip.data.filters`."""

    max_bad_share: float = 0.5
    """Share of damaged samples, or tars, above which the run stops."""

    background: tuple[int, int, int] = WHITE
    """The colour (0 to 255) that lies under transparent pictures."""

    crop_size: int | None = None
    """If set, a random square of this many pixels is cut from the resized picture (training of
    upsamplers). The place depends on `seed`, the epoch and the sample's index alone."""

    crop: Literal["center", "random"] = "center"
    """Where the square is cut along the longer side."""

    flip: bool = False
    """Whether every other picture is mirrored. Captions that say left and right become wrong."""

    max_aspect: float | None = None
    """Pictures whose longer side is more than so many times the shorter are left out. Where the
    json or the table has `width` and `height` this is known beforehand; elsewhere another sample
    stands in for such a picture when it is read."""

    max_pixels: int = MAX_PIXELS
    """Larger pictures are not decoded: a small file can hold one that fills the memory."""

    stream: bool = False
    """Read tars one after another, from copies on this machine, instead of at offsets where they
    are: for disks that seek slowly. Compressed tars, and servers that give whole files only, are
    always read so."""

    shuffle_streams: int = 16
    """Tars read one after another: so many at a time, over all machines."""

    shuffle_buffer: int = 10_000
    """Tars read one after another: so many samples that follow one another are shuffled."""

    copies_gb: float = 50.0
    """Tars read one after another: room for their copies on each machine, GB."""

    index_beside: bool = False
    """Keep the tars' index beside them, where that can be written, instead of in the cache."""

    seed: int = 0
    """Seed of the random crops, flips and choices."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError(f"data must name something; got {self.data!r}: give tars or a folder")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1; got {self.image_size}: use 64, say")
        if self.crop_size is not None and not 1 <= self.crop_size <= self.image_size:
            raise ValueError(
                f"crop_size must be from 1 to image_size; got {self.crop_size} for an image_size "
                f"of {self.image_size}: lower it or raise image_size"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(
                f"max_bad_share must lie in [0, 1]; got {self.max_bad_share}: use 0.1, say"
            )
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1; got {self.max_aspect}: use 2, say")
        if self.max_pixels < 1:
            raise ValueError(
                f"max_pixels must be at least 1; got {self.max_pixels}: use {MAX_PIXELS}, say"
            )
        for name in ("shuffle_streams", "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}: use 16")
        if self.copies_gb <= 0:
            raise ValueError(f"copies_gb must be above 0; got {self.copies_gb}: use 50, say")
        if self.where:
            Filter(self.where)  # which says what it does not understand
        if len(self.background) != 3 or not all(0 <= level <= 255 for level in self.background):
            raise ValueError(
                f"background must be three levels from 0 to 255; got {self.background}: "
                "use [255, 255, 255] for white"
            )


class Rows(Protocol):
    """What a source gives: encoded pictures and their captions, by number."""

    kind: str
    """What it is read from, for people."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` (bytes) and `captions` (a list of one or more)."""

    def key(self, index: int) -> tuple[str, str]:
        """The row's key, and the file that holds it; known even if that file has gone."""

    def fingerprint(self) -> str:
        """Another text where what the rows come from, or which are rows, is another."""

    @property
    def dropped(self) -> Tally:
        """Samples of the source that are not among the rows."""

    @property
    def shard_sizes(self) -> list[int] | None:
        """Rows of each file, where files must be read one after another."""


class TooLong(ValueError):
    """A picture is more elongated than `max_aspect` allows."""


def cause_of(error: Exception) -> str:
    """Under which of `WHILE_READING` a sample that cannot be read is counted."""
    for kind, cause in (
        (Unreachable, UNREACHABLE),
        (OSError, CHANGED),
        (PictureTooLarge, TOO_LARGE),
        (TooLong, TOO_LONG),
    ):
        if isinstance(error, kind):
            return cause
    return CORRUPT


class CaptionedDataset(Dataset[dict[str, Any]]):
    """`ds[i]` is {"image": float32 [3, S, S] in [-1, 1], "caption": str, "key": str}.

    `ds[i, e]` is the same picture in epoch e, with another random crop; `ds[i]` is epoch 0.  S is
    `crop_size` if set, else `image_size`.  `key` is the sample's key in a tar, the path within
    a folder, or else the row's number.

    A sample that cannot be read does not stop training: it is named once in the log, entered in
    `skipped`, and another good sample stands in for it, always the same one: of the next few the
    first that is good, or else one drawn by its number.  If more than `max_bad_share` of the
    samples are bad, ValueError is raised.  The record of bad samples lies in shared memory, so it
    covers the workers of a DataLoader too.

    Raises FileNotFoundError if `data` names nothing, and ValueError if captions or pictures that
    the source promises are not there.
    """

    def __init__(self, config: CaptionedConfig) -> None:
        self.config = config
        self._rows = _open(config)
        if not len(self._rows):
            causes = f" ({self._rows.dropped})" if self._rows.dropped.counts else ""
            raise ValueError(
                f"data must hold captioned pictures; got none in {config.data!r}{causes}"
            )
        sizes = self._rows.shard_sizes
        self.shards = (
            None if sizes is None else Shards(sizes, config.shuffle_streams, config.shuffle_buffer)
        )
        """How it is shuffled, where its files must be read one after another."""
        # One byte a sample (0, or 1 + the cause's number) rather than a dict: a tensor can be
        # shared between processes.
        self._bad = torch.zeros(len(self._rows), dtype=torch.uint8).share_memory_()
        self._draws = (
            config.crop_size is not None
            or config.crop == "random"
            or config.flip
            or config.caption_choice == "random"
        )
        self.varies_by_epoch = self._draws

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        index, epoch = index if isinstance(index, tuple) else (index, 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        asked = index = index % len(self)
        attempt = 0
        while True:
            if not self._bad[index]:
                try:
                    return self._sample(index, epoch)
                except (ValueError, OSError) as error:
                    self._set_bad(index, error)
            attempt += 1
            if attempt <= NEIGHBOURS:
                index = (index + 1) % len(self)
            else:
                index = int(np.random.default_rng((asked, attempt)).integers(len(self)))

    def read(self, index: int) -> dict[str, Any]:
        """Sample `index` as in epoch 0, and no other in its stead.

        Raises ValueError or OSError if it cannot be read.
        """
        return self._sample(index, epoch=0)

    @property
    def skipped(self) -> dict[str, str]:
        """The samples found bad so far, by any worker: key -> reason."""
        reasons = {}
        for index in self._bad.nonzero().flatten().tolist():
            try:
                self._sample(index, epoch=0)
            except (ValueError, OSError) as error:
                reasons[self._rows.key(index)[0]] = str(error)
        return reasons

    @property
    def skips(self) -> dict[str, int]:
        """Samples found bad while reading, by any worker of this process: cause -> count."""
        counts = torch.bincount(self._bad, minlength=len(WHILE_READING) + 1)[1:].tolist()
        return dict(zip(WHILE_READING, counts, strict=True))

    @property
    def kind(self) -> str:
        """What it is read from, for people."""
        return self._rows.kind

    @property
    def left_out(self) -> Tally:
        """Samples of the source that were left out when it was opened."""
        return self._rows.dropped

    @property
    def dropped(self) -> dict[str, int]:
        """The same: cause -> count."""
        return self._rows.dropped.counts

    def fingerprint(self) -> str:
        """Another text where what the samples come from, or which there are, is another."""
        return self._rows.fingerprint()

    def fetch(self, indices: Sequence[int]) -> None:
        """Copy to this machine what these samples need, where it must be copied."""
        if isinstance(self._rows, TarRows):
            self._rows.fetch(indices)

    def key(self, index: int) -> tuple[str, str]:
        """A sample's key, and the file that holds it."""
        return self._rows.key(index)

    def look(self, index: int) -> tuple[Image.Image, list[str]]:
        """A sample's whole picture and its captions. Raises as `read` does."""
        row = self._rows[index]
        return self._picture(row["image"], None), row["captions"]

    def captions(self, index: int) -> list[str]:
        """A sample's captions. Raises as `read` does."""
        return self._rows[index]["captions"]

    def _picture(self, encoded: bytes, draft: int | None) -> Image.Image:
        config = self.config
        picture = decode_image(
            encoded, background=config.background, max_pixels=config.max_pixels, draft=draft
        )
        aspect = max(picture.size) / min(picture.size)
        if config.max_aspect is not None and aspect > config.max_aspect:
            raise TooLong(f"its sides are 1 to {aspect:.2f}, above max_aspect {config.max_aspect}")
        return picture

    def _sample(self, index: int, epoch: int) -> dict[str, Any]:
        config, row = self.config, self._rows[index]
        picture = self._picture(row["image"], config.image_size)
        # What is drawn for a sample follows from the seed, the epoch and its number alone.
        generator = None
        if self._draws:
            generator = torch.Generator().manual_seed(
                (config.seed * 1_000_003 + epoch) * 1_000_033 + index
            )
        size, captions = config.crop_size, row["captions"]
        image = to_tensor(picture, config.image_size, crop=config.crop, generator=generator)
        if size is not None:  # [3, image_size, image_size] -> [3, size, size]
            places = config.image_size - size + 1
            top, left = torch.randint(places, (2,), generator=generator).tolist()
            image = image[:, top : top + size, left : left + size].contiguous()
        if config.flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        choice = 0
        if config.caption_choice == "random":
            choice = int(torch.randint(len(captions), (), generator=generator))
        return {"image": image, "caption": captions[choice], "key": self._rows.key(index)[0]}

    def _set_bad(self, index: int, error: Exception) -> None:
        cause = cause_of(error)
        key, file = self._rows.key(index)
        name = f"{key} of {file or self.config.data}"
        self._bad[index] = 1 + WHILE_READING.index(cause)
        skips = self.skips
        if cause == TOO_LONG:
            if skips[TOO_LONG] == len(self):
                raise ValueError(
                    f"max_aspect must leave some pictures; got {self.config.max_aspect}, which "
                    f"none of {len(self)} in {self.config.data!r} meets: raise it"
                ) from error
            return
        bad = sum(skips.values()) - skips[TOO_LONG]
        logger.warning("skipped %s: %s (%d of %d so far)", name, error, bad, len(self))
        if bad > len(self) * self.config.max_bad_share or sum(skips.values()) == len(self):
            raise ValueError(
                f"data must hold pictures that can be read; got {bad} of {len(self)} that cannot, "
                f"the last being {name}: {error}: copy or unpack the data set again, or raise "
                f"max_bad_share ({self.config.max_bad_share})"
            ) from error


def _open(config: CaptionedConfig) -> Rows:
    if isinstance(config.data, str):
        path = Path(config.data)
        if path.is_dir():
            for pattern in (*TAR_NAMES, "*.parquet"):
                if files := sorted(str(file) for file in path.glob(pattern)):
                    return _open_files(files, config)
            return open_folder(path, config)
        if not re.search(r"[*?\[{]|://|\.(tar|tar\.\w+|tgz|parquet)$", config.data):
            return open_hub(config.data, config)
    return _open_files(expand(config.data), config)


def _open_files(files: list[str], config: CaptionedConfig) -> Rows:
    if all(file.endswith(".parquet") for file in files):
        return open_parquet(files, config)
    return TarRows(files, config)
