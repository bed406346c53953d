"""WebDataset tars, indexed once: every sample is then read at its offset.

An index says for each sample where its picture and its caption lie.  There is one file a tar, keyed
by the tar's address, size and time of change, so that only tars that changed are read again; and
one set of flat files for all the tars of a data set, which are memory-mapped: opening takes as long
for a million samples as for ten, and all processes share the pages.  They lie in the cache of
Hugging Face `datasets`, or beside the tars.  Nothing is ever unpacked.

Tars that cannot be read at an offset, compressed ones above all, are indexed by reading them once
from front to back, and copied to this machine while they are used (`unclip.data.storage`).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray
from tqdm.auto import tqdm

from unclip.checkpoint import written_file, written_whole
from unclip.data.causes import (
    BAD_CAPTION,
    BAD_NAME,
    CUT_OFF,
    EMPTY_CAPTION,
    EMPTY_PICTURE,
    FILTERED,
    NAMES_KEPT,
    NO_CAPTION,
    NO_PICTURE,
    TOO_LONG,
    Tally,
)
from unclip.data.filters import Column, Filter, Mask, columns_of, not_too_long, scalars
from unclip.data.storage import (
    BAD_COMPRESSION,
    Copy,
    Source,
    cache_folder,
    copy_of,
    digest,
    is_remote,
    opened,
    read,
    retried,
    source_of,
)

if TYPE_CHECKING:
    from unclip.data.captioned import CaptionedConfig

logger = logging.getLogger(__name__)

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
FORMAT = 2
"""Raised when what an index holds changes, so that those of older versions are made again."""
READ_TOGETHER = 2**16
"""A picture and a caption that lie this close, in bytes, are fetched in one read."""
INDEX_FOLDER = ".unclip_index"
"""Where an index lies that is kept beside its tars."""
UNUSED_DAYS = 90
"""Indices that nobody has opened for so long are taken away."""

RECORD = np.dtype(
    [
        ("tar", "<i4"),
        ("key_at", "<i8"),
        ("key_size", "<i4"),
        ("image_at", "<i8"),
        ("image_size", "<i8"),
        ("caption_at", "<i8"),
        ("caption_size", "<i8"),
    ]
)

SPANS = ("image", "caption")


class DamagedTar(ValueError):
    """What comes next in a tar cannot be read."""


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and where its bytes lie."""

    name: str
    at: int
    size: int


def members(file: Any, size: int | None) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes, in order; only headers are read.

    Where the size is not known beforehand, `file` is one that can only be read on.

    Raises DamagedTar where the tar is cut off or goes on with something that is no tar.
    """
    at = 0
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if size is not None and member.offset_data + member.size > size:
                    raise DamagedTar(f"it is cut off at byte {size}")
                if member.isreg():
                    yield Member(member.name, member.offset_data, member.size)
            at = tar.offset
        # To tarfile whatever is no header is the end of the tar, and so is the end of the file.
        file.seek(at)
        block = file.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        raise DamagedTar(f"{error} ({size} bytes)" if size else str(error)) from error
    except BAD_COMPRESSION as error:
        raise DamagedTar(str(error)) from error
    if len(block) < tarfile.BLOCKSIZE:
        raise DamagedTar(f"it is cut off at byte {at + len(block)}")
    if any(block):
        raise DamagedTar(f"there is no tar header at byte {at}")


# One tar's index


@dataclass
class Index:
    """What a tar holds: a record for each good sample, and counts of the others by cause."""

    records: NDArray[Any]
    """[N] of RECORD."""
    keys: bytes
    """The samples' keys, one after another."""
    columns: dict[str, Column]
    """Name -> [N] float64 or text: the short values of the samples' json, to filter by."""
    dropped: Tally
    """The samples without a record."""
    damage: str
    """Why the tar could not be read to its end, or nothing."""
    fields: list[str]
    """What could serve as `caption_key`, by the first samples."""

    def save(self, path: Path) -> None:
        about = {
            "dropped": asdict(self.dropped),
            "damage": self.damage,
            "fields": self.fields,
        }
        columns = {f"column:{name}": column for name, column in self.columns.items()}
        with written_file(path) as aside, aside.open("wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                records=self.records,
                keys=np.frombuffer(self.keys, np.uint8),
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                **columns,
            )

    def key(self, number: int) -> str:
        """The key of a sample."""
        start, size = (int(self.records[name][number]) for name in ("key_at", "key_size"))
        return self.keys[start : start + size].decode("utf-8", "surrogateescape")

    @classmethod
    def load(cls, path: Path) -> Index:
        with np.load(path) as arrays:
            about = json.loads(arrays["about"].tobytes())
            return cls(
                records=arrays["records"],
                keys=arrays["keys"].tobytes(),
                columns={
                    name.removeprefix("column:"): arrays[name]
                    for name in arrays.files
                    if name.startswith("column:")
                },
                dropped=Tally(**about.pop("dropped")),
                **about,
            )


def index_tar(source: Source, caption_key: str) -> Index:
    """Read a tar's headers, captions and json once."""
    with opened(source) as file:
        return _index(file, source.size if source.in_place else None, caption_key)


def _index(file: Any, size: int | None, caption_key: str) -> Index:
    records: list[tuple[int, ...]] = []
    keys, rows = bytearray(), []
    dropped = Tally()
    fields: set[str] = set()
    damage = ""
    extension, *path = caption_key.split(".")

    def take(key: str, files: Mapping[str, Member], texts: Mapping[str, bytes], bad: str) -> None:
        picture = next((files[name] for name in EXTENSIONS if name in files), None)
        meta: Any = None
        with suppress(ValueError):
            meta = json.loads(texts.get("json", b"null"))
        if len(records) < 100:
            fields.update(files.keys() - {"json", *EXTENSIONS}, _text_keys("json", meta))
        captions: list[str] = []
        cause = NO_CAPTION
        if (text := texts.get(extension)) is not None:
            try:
                captions = read_captions(text, path)
                cause = "" if captions else NO_CAPTION if path else EMPTY_CAPTION
            except ValueError:
                cause = BAD_CAPTION
        if bad:
            cause = BAD_NAME
        elif picture is None:
            cause = NO_PICTURE
        elif picture.size == 0:
            cause = EMPTY_PICTURE
        if cause or picture is None:
            dropped.add(cause, [bad or key])
            return
        encoded = key.encode("utf-8", "surrogateescape")
        caption = files[extension]
        place = (picture.at, picture.size, caption.at, caption.size)
        records.append((0, len(keys), len(encoded), *place))
        keys.extend(encoded)
        rows.append(dict(scalars(meta)))

    files: dict[str, Member] = {}
    texts: dict[str, bytes] = {}
    key = bad = ""
    try:
        for member in members(file, size):
            name = PurePosixPath(member.name)
            stem, _, kind = name.name.partition(".")
            if not stem:  # a hidden file
                continue
            its_key = str(name.parent / stem)
            kind = kind.lower()
            if its_key != key or kind in files:
                if files:
                    take(key, files, texts, bad)
                key, bad, files, texts = its_key, "", {}, {}
            files[kind] = member
            if kind in (extension, "json"):
                file.seek(member.at)
                texts[kind] = file.read(member.size)
            if name.is_absolute() or ".." in name.parts:
                bad = bad or member.name
        if files:
            take(key, files, texts, bad)
    except DamagedTar as error:
        # Whether the last sample had more files than were found, nobody can say: leave it out.
        damage = str(error)
        dropped.add(CUT_OFF, [f"{key}: {damage}"])
    return Index(
        records=np.array(records, RECORD),
        keys=bytes(keys),
        columns=columns_of(rows),
        dropped=dropped,
        damage=damage,
        fields=sorted(fields),
    )


def read_captions(content: bytes, path: Sequence[str]) -> list[str]:
    """The captions in a text (`path` empty) or at a path of a json, stripped; blank ones left out.

    Raises ValueError if the content is not UTF-8 or no json.
    """
    value: Any = content.decode("utf-8")
    if path:
        value = json.loads(value or "null")
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
    texts = value if isinstance(value, list) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _text_keys(prefix: str, value: Any) -> set[str]:
    """The dotted keys of all strings, and lists of strings, in a json value."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
        return {prefix}
    items = value.items() if isinstance(value, dict) else ()
    return {key for name, item in items for key in _text_keys(f"{prefix}.{name}", item)}


# A data set's index


class TarRows:
    """The complete samples of tars, as rows `{"captions", "image"}`.

    `image` is the encoded picture, `captions` a list of one or more.  Reading a row raises OSError
    if its tar has gone or changed, or cannot be reached.

    Args:
        files: paths or addresses of tars, in order.
        config: `caption_key`, `where`, `max_aspect` and `max_bad_share` say which samples are
            rows, and how much may be damaged; `stream`, `copies_gb` and `index_beside` how they are
            read, and where the index lies.

    Raises:
        FileNotFoundError: a tar is not there.
        ValueError: no tar has the caption or what the filter names, or too much is damaged.
    """

    def __init__(self, files: Sequence[str], config: CaptionedConfig) -> None:
        self.files = list(files)
        self.kind = f"{len(self.files)} WebDataset tars"
        self._path = config.caption_key.split(".")[1:]
        # How a path goes through fsspec may need the network: ask for all at once.
        with ThreadPoolExecutor(32) as threads:
            self._sources = list(threads.map(source_of, self.files))
            filtered = config.where or config.max_aspect is not None
            tables = list(threads.map(_table_time, self.files)) if filtered else []
        if config.stream:
            self._sources = [replace(source, in_place=False) for source in self._sources]
        self._room = int(config.copies_gb * 1e9)
        cache = _index_folder(self.files, config.index_beside)
        names = [_name_from(cache, file) for file in self.files]
        states = [(source.size, source.changed) for source in self._sources]
        asked = (config.caption_key, config.where, config.max_aspect)
        stem = f"set-{digest(FORMAT, names, asked)}"
        self._folder = cache / f"{stem}-{digest(states, tables)}"
        if not (self._folder / "about.json").is_file():
            # Of a machine's processes one does the work.
            with FileLock(cache / ".lock"):
                if not (self._folder / "about.json").is_file():
                    parts = [
                        cache
                        / f"tar-{digest(FORMAT, name, config.caption_key)}-{digest(state)}.npz"
                        for name, state in zip(names, states, strict=True)
                    ]
                    _index_missing(self._sources, parts, config.caption_key)
                    _join(self.files, parts, config, self._folder)
                    _prune(cache, [self._folder, *parts])
        with suppress(OSError):  # somebody else's
            os.utime(self._folder)
        about = json.loads((self._folder / "about.json").read_text())
        self.dropped = Tally(**about["dropped"])
        self.shard_sizes: list[int] | None = None
        """Samples of each tar, where tars are read one after another."""
        self._copies: list[Copy | None] = [None] * len(self.files)
        if not all(source.in_place for source in self._sources):
            self.shard_sizes = about["sizes"]
            self._copies = [
                None if source.in_place else Copy(length, self._room)
                for source, length in zip(self._sources, about["lengths"], strict=True)
            ]
        self._map()
        self._report(about["damage"], config.max_bad_share)

    def _map(self) -> None:
        def mapped(name: str, dtype: Any) -> NDArray[Any]:
            if not os.path.getsize(self._folder / name):
                return np.empty(0, dtype)
            return np.memmap(self._folder / name, dtype, mode="r")

        self._records, self._keys = mapped("records", RECORD), mapped("keys", np.uint8)

    def __getstate__(self) -> dict[str, Any]:  # a pickled map would be a copy
        return {k: v for k, v in self.__dict__.items() if k not in ("_records", "_keys")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._map()

    def _report(self, damage: Mapping[str, str], max_bad_share: float) -> None:
        for file, reason in list(damage.items())[:10]:
            logger.warning("%s is damaged: %s; what lies before it is used", file, reason)
        if self.dropped.counts:
            logger.warning(
                "dropped %d samples: %s", sum(self.dropped.counts.values()), self.dropped
            )
        bad = self.dropped.bad
        for count, total, what in (
            (len(damage), len(self.files), "whole tars"),
            (bad, bad + len(self), "samples that can be read"),
        ):
            if count > max_bad_share * total:
                worst = next(iter(damage.items()), None)
                such = f"; {worst[0]}: {worst[1]}" if worst else ""
                raise ValueError(
                    f"data must hold {what}; got {count} of {total} that are not "
                    f"({self.dropped}){such}: fetch or make the tars again, or raise max_bad_share "
                    f"({max_bad_share})"
                )

    def __len__(self) -> int:
        return len(self._records)

    def fingerprint(self) -> str:
        """Another text where a tar, or which of its samples are rows, is another."""
        states = [(PurePosixPath(s.path).name, s.size, s.changed) for s in self._sources]
        return digest(states, len(self))

    def key(self, index: int) -> tuple[str, str]:
        """The key of a row and the address of its tar; known even if the tar has gone."""
        tar, start, size, *_ = self._records[index].item()
        key = self._keys[start : start + size].tobytes().decode("utf-8", "surrogateescape")
        return key, self.files[tar]

    def fetch(self, indices: Sequence[int]) -> None:
        """Copy the tars of rows to this machine, where they need it; what fails is left to those
        who read it."""
        for tar in np.unique(self._records["tar"][np.asarray(indices)]).tolist():
            if (copy := self._copies[tar]) is not None:
                with suppress(OSError):
                    copy_of(self._sources[tar], copy)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tar, _, _, image_at, image_size, caption_at, caption_size = self._records[index].item()
        spans = [(image_at, image_at + image_size), (caption_at, caption_at + caption_size)]
        read_span = functools.partial(read, self._sources[tar], copy=self._copies[tar])
        start, end = min(spans)[0], max(spans)[1]
        if end - start <= image_size + caption_size + READ_TOGETHER:
            content = read_span(start, end)
            image, caption = (content[a - start : b - start] for a, b in spans)
        else:
            image, caption = (read_span(a, b) for a, b in spans)
        return {"captions": read_captions(caption, self._path), "image": image}


def _index_folder(files: Sequence[str], beside: bool) -> Path:
    """Beside the first tar, if that is asked for and possible, else in the cache."""
    if beside and not is_remote(files[0]):
        folder = Path(files[0]).parent / INDEX_FOLDER
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        logger.warning("%s cannot be written: the index goes into the cache", folder)
    cache_folder().mkdir(parents=True, exist_ok=True)
    return cache_folder()


def _name_from(cache: Path, file: str) -> str:
    """What an index calls a tar: where it lies from there, if they are moved together."""
    if is_remote(file):
        return file
    path = os.path.abspath(file)
    return os.path.relpath(path, cache.absolute()) if cache.name == INDEX_FOLDER else path


def _index_missing(sources: Sequence[Source], parts: Sequence[Path], caption_key: str) -> None:
    """Index the tars that have none yet, several at a time."""
    todo = [k for k, part in enumerate(parts) if not part.is_file()]
    if not todo:
        return
    # Waits for the network, where the others wait for the processor.
    remote = is_remote(sources[0].path)
    pool: Callable[[int], Executor] = ThreadPoolExecutor if remote else ProcessPoolExecutor
    workers = 32 if remote else os.cpu_count() or 1
    job = functools.partial(_index_one, caption_key=caption_key)
    jobs = [(sources[k], parts[k]) for k in todo]
    bar = functools.partial(tqdm, total=len(todo), desc="indexing", unit="tar", disable=None)
    if workers == 1 or (len(todo) < 8 and not remote):
        for arguments in bar(jobs):
            job(arguments)
        return
    with pool(min(workers, len(todo))) as executor:
        for _ in bar(executor.map(job, jobs, **({} if remote else {"chunksize": 4}))):
            pass


def _index_one(job: tuple[Source, Path], caption_key: str) -> None:
    source, part = job
    retried(lambda: index_tar(source, caption_key), source.path).save(part)


def _join(
    files: Sequence[str], parts: Sequence[Path], config: CaptionedConfig, folder: Path
) -> None:
    """Write the index of all tars, less what the filter leaves out, as flat files."""
    kept_by = Filter(config.where) if config.where else None
    wanted = set() if kept_by is None else set(kept_by.names)
    wanted |= {"width", "height"} if config.max_aspect is not None else set()
    dropped = Tally()
    sizes, lengths = [], []
    damage, fields, known, keys_end, found = {}, set(), set[str](), 0, 0
    with written_whole(folder) as out:
        with (out / "records").open("wb") as records_file, (out / "keys").open("wb") as keys_file:
            for number, (file, part) in enumerate(zip(files, parts, strict=True)):
                index = Index.load(part)
                dropped.update(index.dropped, f"{file}: ")
                fields.update(index.fields)
                found += len(index.records)
                if index.damage:
                    damage[file] = index.damage
                records, columns = index.records, index.columns
                if wanted - columns.keys():
                    columns = _table_columns(file, index, wanted) | columns
                kept = np.ones(len(records), bool)
                for cause, passes in _filters(kept_by, config.max_aspect):
                    passing = passes(columns, len(records))
                    out_now = np.flatnonzero(kept & ~passing)
                    first = [f"{file}: {index.key(k)}" for k in out_now[:NAMES_KEPT]]
                    dropped.add(cause, first, len(out_now))
                    kept &= passing
                known.update(columns)
                records = records[kept]
                records["tar"] = number
                records["key_at"] += keys_end
                keys_end += len(index.keys)
                records.tofile(records_file)
                keys_file.write(index.keys)
                sizes.append(len(records))
                ends = [records[f"{kind}_at"] + records[f"{kind}_size"] for kind in SPANS]
                lengths.append(int(max(end.max() for end in ends)) if len(records) else 0)
        key = config.caption_key
        if not found and key not in fields and (fields or not dropped.bad):
            raise ValueError(
                f"caption_key must name the captions in {files[0]}; got {key!r}: "
                f"choose one of {', '.join(sorted(fields)) or '(there are none)'}"
            )
        if kept_by is not None and found:
            kept_by.check_names(known, "the samples' json")
        about = {"dropped": asdict(dropped), "damage": damage, "sizes": sizes, "lengths": lengths}
        (out / "about.json").write_text(json.dumps(about))


def _filters(
    kept_by: Filter | None, max_aspect: float | None
) -> Iterator[tuple[str, Callable[[Mapping[str, Column], int], Mask]]]:
    """Cause -> what says which samples are not left out for it."""
    if kept_by is not None:
        yield FILTERED, kept_by
    if max_aspect is not None:
        yield TOO_LONG, functools.partial(not_too_long, max_aspect)


def _prune(cache: Path, used: Sequence[Path]) -> None:
    """Take away what these took the place of, and what nobody has used for long."""
    stems = {path.name.rpartition("-")[0] for path in used}
    names = {path.name for path in used}
    for path in used:
        os.utime(path)
    for entry in os.scandir(cache):
        is_index = entry.name.startswith(("set-", "tar-"))
        is_old = entry.name.rpartition("-")[0] in stems and entry.name not in names
        with suppress(OSError):
            days = (time.time() - entry.stat().st_mtime) / 86_400
            if is_index and (is_old or days > UNUSED_DAYS):
                shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


# The table beside a tar that img2dataset writes


def _table_path(tar: str) -> str:
    return re.sub(r"\.(tar(\.\w+)?|tgz)$", "", tar) + ".parquet"


def _table_time(tar: str) -> str | None:
    with suppress(FileNotFoundError):
        return source_of(_table_path(tar)).changed
    return None


def _table_columns(tar: str, index: Index, names: set[str]) -> dict[str, Column]:
    """Columns of the Parquet file beside a tar, in the order of the tar's samples."""

    def read_table() -> dict[str, list[Any]]:
        with fsspec.open(_table_path(tar), "rb") as file:
            schema = pq.read_schema(file).names
            if "key" not in schema:
                return {}
            there = [name for name in schema if name in names]
            return pq.read_table(file, columns=["key", *there]).to_pydict()

    try:
        table = retried(read_table, _table_path(tar))
    except FileNotFoundError:
        return {}
    if not table:
        return {}
    row_of = {str(key): row for row, key in enumerate(table.pop("key"))}
    keys = [PurePosixPath(index.key(k)).name for k in range(len(index.records))]
    rows = [row_of.get(key) for key in keys]
    picked = [{n: table[n][r] for n in table} if r is not None else {} for r in rows]
    return columns_of([{n: v for n, v in row.items() if v is not None} for row in picked])
