"""The captions of a protocol as a list of ids and texts, and their hash."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unclip.data.captioned import CaptionedConfig, CaptionedDataset
from unclip.data.shapes import draw_scene
from unclip.evaluation.protocol import CaptionsConfig


@dataclass(frozen=True, slots=True)
class Item:
    """A caption and the id of the picture it was written for."""

    id: str
    caption: str


def list_captions(config: CaptionsConfig) -> list[Item]:
    """All captions that `config` names, in order.

    Raises:
        ValueError: an id is unknown or there twice; the list is another than `sha256` says.
        FileNotFoundError: a file or a source is not there.
    """
    items = _all(config)
    known = {item.id: item for item in items}
    if len(known) < len(items):
        twice = Counter(item.id for item in items).most_common(1)[0][0]
        raise ValueError(
            f"captions.data must have an id a picture; got {twice!r} twice in {config.data!r}: "
            "leave one out"
        )
    if config.ids is not None:
        items = [_known(known, name, config) for name in read_ids(config.ids)]
    found = list_sha256(items)
    if config.sha256 is not None and not found.startswith(config.sha256.lower()):
        raise ValueError(
            f"captions.sha256 must be that of the list; got {config.sha256} for {config.data!r}, "
            f"whose {len(items)} ids and captions have {found}: take the protocol's own list"
        )
    return items


def list_sha256(items: Sequence[Item]) -> str:
    """sha256 of the lines `id<tab>caption`, in order."""
    lines = "".join(f"{item.id}\t{item.caption}\n" for item in items)
    return hashlib.sha256(lines.encode()).hexdigest()


def shapes_id(split: str, index: int) -> str:
    """What a scene of the shapes world goes by."""
    return f"shapes-{split}-{index}"


def shapes_index(id: str) -> int:
    """Which scene that is."""
    return int(id.rpartition("-")[2])


def read_ids(path: Path) -> list[str]:
    """The ids of a text file, one a line; empty lines are skipped.

    Raises:
        ValueError: there is none, or one twice.
    """
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"captions.ids must be UTF-8 text; got {path}: {error}") from error
    ids = [name for name in ids if name]
    if not ids or len(set(ids)) < len(ids):
        fault = next((name for name in ids if ids.count(name) > 1), "none")
        raise ValueError(f"captions.ids must name ids, each once; got {fault!r} in {path}")
    return ids


def _known(known: dict[str, Item], name: str, config: CaptionsConfig) -> Item:
    if name not in known:
        raise ValueError(
            f"captions.ids must be ids of {config.data!r}; got {name!r}, which is not among its "
            f"{len(known)}, such as {next(iter(known), 'none')!r}: mend {config.ids}"
        )
    return known[name]


def _all(config: CaptionsConfig) -> list[Item]:
    if config.data == "shapes":
        assert config.count is not None
        return [
            Item(shapes_id(config.shapes.split, k), draw_scene(config.shapes, k)[1].text)
            for k in range(config.count)
        ]
    if config.data.endswith(".jsonl"):
        return _read_list(Path(config.data))
    dataset = open_captioned(config.data, config)
    return [Item(dataset.key(k)[0], dataset.captions(k)[0]) for k in range(len(dataset))]


def open_captioned(data: str, config: CaptionsConfig) -> CaptionedDataset:
    """Captioned pictures, their captions read as `config` says."""
    return CaptionedDataset(
        CaptionedConfig(
            data=data,
            caption_key=config.caption_key,
            caption_column=config.caption_column,
            split=config.split,
        )
    )


def _read_list(path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            items.append(Item(str(values["id"]), values["caption"].strip()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} must have an id and a caption a line; line {number} has not ({error}): "
                "write it anew"
            ) from error
    if not items:
        raise ValueError(f"{path} must have an id and a caption a line; got none: write some")
    return items
