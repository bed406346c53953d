"""Embeddings of captioned pictures on disk, in clip-retrieval's layout: ours or LAION's own.

    DIR/img_emb/img_emb_0000.npy         [R, D] fp16: row k is of row k of the metadata
    DIR/text_emb/text_emb_0000.npy       [R, D] fp16, where they were asked for
    DIR/metadata/metadata_0000.parquet   R rows: caption, key, and whatever else
    DIR/manifest.json                    ours alone: the CLIP, the source, checksums
    DIR/pieces/0000.json                 ours alone, until the last piece is done: its record

Shapes: R rows of a piece, D width of the joint space.
"""

from __future__ import annotations

import glob
import hashlib
import json
import mmap
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from unclip.data.tables import CAPTION_COLUMNS

MANIFEST_NAME = "manifest.json"
FORMAT, VERSION = "unclip-embeddings", 1
KINDS = {"img_emb": "npy", "text_emb": "npy", "metadata": "parquet"}
"""Sub-folder -> extension of its files."""
DTYPES = (np.dtype(np.float16), np.dtype(np.float32))


def is_embedding_folder(data: str | list[str]) -> bool:
    """Whether what a source names is a folder of embeddings rather than of pictures."""
    return isinstance(data, str) and (Path(data) / "img_emb").is_dir()


def file_of(folder: Path, kind: str, number: str) -> Path:
    """Where a piece's file of a kind (`img_emb`, `text_emb`, `metadata`) lies."""
    return folder / kind / f"{kind}_{number}.{KINDS[kind]}"


def sha256(path: Path) -> str:
    """Checksum of a file, read a little at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `unclip.embed` says of a folder; None where it says nothing, as in LAION's.

    Raises:
        ValueError: it is damaged, or of another format or version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy the folder again") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else ()
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{path} must be of format {FORMAT!r}, version {VERSION}; got {found}: install the "
            "release of unclip that wrote it, or take it away to use the folder as LAION's"
        )
    return manifest


def made_by(recorded: Mapping[str, Any], clip: Any) -> bool:
    """Whether a manifest's `clip` is this one; of one without an image tower, whether it is the
    text tower of that one."""
    if clip.image_size is None:
        return recorded.get("text_fingerprint") == clip.fingerprint("text")
    return bool(recorded["fingerprint"] == clip.fingerprint())


class Fault(NamedTuple):
    """Something wrong with a folder or a sample."""

    cause: str
    """In a few words, the same for all of its kind."""
    name: str
    """Which file or sample."""
    error: str
    """One sentence: what must be, what is, and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One numbered part of a folder: files whose rows belong together."""

    number: str
    rows: int
    images: Path
    metadata: Path


def _numbered(folder: Path, kind: str) -> dict[str, Path]:
    """Number (as written) -> file, in the order of the numbers: LAION's have no leading zeros."""
    found = {}
    for path in (folder / kind).glob(f"{kind}_*.{KINDS[kind]}"):
        if match := re.fullmatch(rf"{kind}_(\d+)", path.stem):
            found[match[1]] = path
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def open_rows(path: Path) -> np.ndarray:
    """Map an `.npy` of embeddings [R, D] into memory.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        rows = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} must be a whole .npy; got {error}: copy it again") from error
    if rows.ndim != 2 or rows.dtype not in DTYPES:
        raise ValueError(
            f"{path} must hold rows [R, D] of float16 or float32; got {list(rows.shape)} of "
            f"{rows.dtype}: convert it with numpy's astype(numpy.float16)"
        )
    return rows


def find_pieces(folder: Path) -> tuple[list[Piece], int, list[Fault]]:
    """The pieces of a folder in order, the embeddings' width D, and all that is wrong with it.

    Only headers are read: rows that are not finite, and files that have changed, are not found.
    """
    pieces: list[Piece] = []
    faults: list[Fault] = []
    width = 0
    images, metadata = _numbered(folder, "img_emb"), _numbered(folder, "metadata")
    texts = _numbered(folder, "text_emb")
    if not images:
        said = f"{folder / 'img_emb'} must hold img_emb_0000.npy and so on; got none: copy it again"
        faults.append(Fault("no embeddings", str(folder), said))
    for number in sorted(images.keys() | metadata.keys(), key=int):
        if number not in images or number not in metadata:
            lacking = file_of(folder, "metadata" if number in images else "img_emb", number)
            said = f"{lacking} is missing beside the other files of piece {number}: copy it again"
            faults.append(Fault("missing piece", lacking.name, said))
            continue
        try:
            rows = open_rows(images[number])
        except ValueError as error:
            faults.append(Fault("unreadable embeddings", images[number].name, str(error)))
            continue
        try:
            captions = pq.read_metadata(metadata[number]).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            said = f"{metadata[number]} must be a whole Parquet file; got {error}: copy it again"
            faults.append(Fault("unreadable metadata", metadata[number].name, said))
            continue
        if len(rows) != captions:
            said = (
                f"{images[number]} must have as many rows as {metadata[number].name}; got "
                f"{len(rows)} and {captions}: fetch both again, they are not of one piece"
            )
            faults.append(Fault("misaligned piece", images[number].name, said))
            continue
        width = width or rows.shape[1]
        if rows.shape[1] != width:
            said = (
                f"{images[number]} must be {width} wide, as the pieces before it; got "
                f"{rows.shape[1]}: take out what another CLIP has embedded"
            )
            faults.append(Fault("mixed widths", images[number].name, said))
            continue
        if number in texts:
            faults += _text_faults(texts[number], rows.shape)
        pieces.append(
            Piece(
                number=number,
                rows=len(rows),
                images=images[number],
                metadata=metadata[number],
            )
        )
    faults += _manifest_faults(folder, pieces, images.keys() & metadata.keys())
    return pieces, width, faults


def _text_faults(path: Path, shape: tuple[int, ...]) -> list[Fault]:
    try:
        found = open_rows(path).shape
    except ValueError as error:
        return [Fault("unreadable embeddings", path.name, str(error))]
    if found == shape:
        return []
    said = f"{path} must be of the pictures' shape {list(shape)}; got {list(found)}: fetch both"
    return [Fault("misaligned piece", path.name, said)]


def _manifest_faults(folder: Path, pieces: list[Piece], there: set[str]) -> list[Fault]:
    """Where a folder is not what its manifest says; pieces whose files are not all `there`, and
    files that cannot be read, count once."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [Fault("unreadable manifest", MANIFEST_NAME, str(error))]
    if manifest is None:
        return []
    if manifest["pieces"] is None:
        said = f"{folder} is not finished: run the command that writes it again, it goes on"
        return [Fault("unfinished folder", str(folder), said)]
    faults = []
    written = manifest["pieces"]
    for number in sorted(written.keys() - there, key=int):
        said = f"piece {number} of {folder} is missing: copy it, or run unclip.embed again"
        faults.append(Fault("missing piece", file_of(folder, "img_emb", number).name, said))
    for piece in pieces:
        rows = written.get(piece.number, {}).get("rows")
        if rows != piece.rows:
            said = (
                f"{piece.images} must have the rows that {MANIFEST_NAME} says, {rows}; got "
                f"{piece.rows}: copy the folder again"
            )
            faults.append(Fault("misaligned piece", piece.images.name, said))
    return faults


class EmbeddingDataset(Dataset[dict[str, Any]]):
    """`ds[i]` is {"image_embed": float32 [D], "caption": str}; files are mapped, never read whole.

    Captions are read through Hugging Face `datasets`, which copies that one column into its cache
    once and maps it.

    Attributes:
        folder: where it lies. embed_dim: D. manifest: what `unclip.embed` says of it, or None.

    Raises:
        ValueError: files are missing, damaged, not aligned or of several widths; or, when it is
            read, a row is not finite.
    """

    def __init__(self, folder: Path, caption_column: str | None = None) -> None:
        self.folder = folder
        self.pieces, self.embed_dim, faults = find_pieces(folder)
        if faults:
            more = f" (and {len(faults) - 1} more faults)" if faults[1:] else ""
            raise ValueError(faults[0].error + more)
        self.manifest = read_manifest(folder)
        self._starts = list(accumulate((piece.rows for piece in self.pieces), initial=0))
        if not len(self):
            raise ValueError(
                f"{folder} must hold embeddings; got pieces without rows: write it anew"
            )
        column = find_caption_column(self.pieces[0].metadata, caption_column)
        captions = datasets.load_dataset(
            "parquet",
            # The library globs every path again, so brackets in a folder's name must be escaped.
            data_files=[glob.escape(str(piece.metadata)) for piece in self.pieces],
            columns=[column],
            split="train",
        )
        self._captions, self._column = captions, column
        self._maps: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        # A map is pickled as all the bytes it maps; a worker that is not a fork maps anew.
        return {**self.__dict__, "_maps": None}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A batch at once: captions are read together."""
        if self._maps is None:
            self._maps = [open_rows(piece.images) for piece in self.pieces]
        embeds = np.empty((len(indices), self.embed_dim), np.float32)
        touched = set()
        for k, index in enumerate(indices):
            if not 0 <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            piece = bisect_right(self._starts, index) - 1
            embeds[k] = self._maps[piece][index - self._starts[piece]]
            touched.add(piece)
        for piece in touched:
            _let_go(self._maps[piece])
        if not np.isfinite(embeds).all():
            k = int(np.isfinite(embeds).all(axis=1).argmin())
            piece = bisect_right(self._starts, indices[k]) - 1
            raise ValueError(
                f"{self.pieces[piece].images} must hold finite numbers; got a row that does not, "
                f"{indices[k] - self._starts[piece]}: embed that piece again, or take it out"
            )
        captions = self._captions[list(indices)][self._column]
        return [
            {"image_embed": embed, "caption": caption or ""}
            for embed, caption in zip(torch.from_numpy(embeds), captions, strict=True)
        ]


def _let_go(rows: np.ndarray) -> None:
    """Unmap what was read: each row brings its neighbours with it, up to 64 kB of them, and after
    some thousand random rows all of a file would count as this process's memory. It stays in the
    system's cache of files."""
    mapped = getattr(rows, "_mmap", None)  # of numpy.memmap; it has no public name
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def find_caption_column(metadata: Path, named: str | None) -> str:
    """The column of captions of a piece: the one that is named, else the first usual one.

    Raises:
        ValueError: it is not there.
    """
    columns = pq.read_schema(metadata).names
    column = named or next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is None or column not in columns:
        raise ValueError(
            f"caption_column must be a column of {metadata}; got {named!r}: choose one of "
            f"{', '.join(columns)}"
        )
    return column
