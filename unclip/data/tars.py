"""WebDataset tars read in place: indexed once, then every sample is read at its offset.

An index says for each sample where its picture and its caption lie.  It is kept in the cache of
Hugging Face `datasets` (HF_HOME or HF_DATASETS_CACHE say where), one file a tar, keyed by the tar's
address, size and time of change, so that only tars that changed are read again; and one set of flat
files for all the tars of a data set, which are memory-mapped: opening takes as long for a million
samples as for ten, and all processes share the pages.  Nothing is ever unpacked.

Tars may lie on a local disk or at any address that fsspec knows (`hf://`, `s3://`, `https://`).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray
from tqdm.auto import tqdm

from unclip.checkpoint import written_whole
from unclip.data.filters import Column, Filter, columns_of, scalars

logger = logging.getLogger(__name__)

EXTENSIONS = ("png", "jpg", "jpeg", "webp")
FORMAT = 1
"""Raised when what an index holds changes, so that those of older versions are made again."""
READ_TOGETHER = 2**16
"""A picture and a caption that lie this close, in bytes, are fetched in one read."""
OPEN_FILES = 128
"""Tars that a process keeps open; systems allow a thousand or so files."""

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

NO_PICTURE, NO_CAPTION, FILTERED = "no picture", "no caption", "outside the filter"
LEFT_OUT = (NO_PICTURE, NO_CAPTION, FILTERED)
"""Causes that are no damage: tars may hold more than pairs."""
EMPTY_PICTURE, BAD_CAPTION = "picture of no bytes", "caption not in UTF-8 or no valid json"
BAD_NAME, CUT_OFF = "name that leads out of the tar", "cut off by the tar's end"


class DamagedTar(ValueError):
    """What comes next in a tar cannot be read."""


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and where its bytes lie."""

    name: str
    at: int
    size: int


def members(file: IO[bytes], size: int) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes, in order; only headers are read.

    Raises DamagedTar where the tar is cut off or goes on with something that is no tar.
    """
    at = 0
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                if member.offset_data + member.size > size:
                    raise DamagedTar(f"it is cut off at byte {size}")
                if member.isreg():
                    yield Member(member.name, member.offset_data, member.size)
            at = tar.offset
    except tarfile.TarError as error:
        raise DamagedTar(f"{error} ({size} bytes)") from error
    # To tarfile whatever is no header is the end of the tar, and so is the end of the file.
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DamagedTar(f"it is cut off at byte {size}")
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
    dropped: dict[str, int]
    """Cause -> samples."""
    damage: str
    """Why the tar could not be read to its end, or nothing."""
    fields: list[str]
    """What could serve as `caption_key`, by the first samples."""

    def save(self, path: Path) -> None:
        about = {"dropped": self.dropped, "damage": self.damage, "fields": self.fields}
        columns = {f"column:{name}": column for name, column in self.columns.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                np.savez(
                    file,
                    allow_pickle=False,
                    records=self.records,
                    keys=np.frombuffer(self.keys, np.uint8),
                    about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                    **columns,
                )
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: Path) -> Index:
        with np.load(path) as arrays:
            return cls(
                records=arrays["records"],
                keys=arrays["keys"].tobytes(),
                columns={
                    name.removeprefix("column:"): arrays[name]
                    for name in arrays.files
                    if name.startswith("column:")
                },
                **json.loads(arrays["about"].tobytes()),
            )


def index_tar(path: str, size: int, caption_key: str) -> Index:
    """Read a tar's headers, captions and json once."""
    with _open(path) as file:
        return _index(file, size, caption_key)


def _index(file: IO[bytes], size: int, caption_key: str) -> Index:
    records: list[tuple[int, ...]] = []
    keys, rows = bytearray(), []
    dropped: Counter[str] = Counter()
    fields: set[str] = set()
    damage = ""

    def take(key: str, files: Mapping[str, Member], climbs: bool) -> None:
        extension, *path = caption_key.split(".")
        picture = next((files[name] for name in EXTENSIONS if name in files), None)
        meta: Any = None
        content = {}
        for name in {extension, "json"} & files.keys():
            file.seek(files[name].at)
            content[name] = file.read(files[name].size)
        with suppress(ValueError):
            meta = json.loads(content.get("json", b"null"))
        if len(records) + sum(dropped.values()) < 100:
            fields.update(files.keys() - {"json", *EXTENSIONS}, _text_keys("json", meta))
        try:
            captions = read_captions(content.get(extension, b""), path)
            cause = "" if captions else NO_CAPTION
        except ValueError:
            cause = BAD_CAPTION
        if climbs:
            cause = BAD_NAME
        elif picture is None:
            cause = NO_PICTURE
        elif picture.size == 0:
            cause = EMPTY_PICTURE
        if cause or picture is None:
            dropped[cause] += 1
            return
        encoded = key.encode("utf-8", "surrogateescape")
        caption = files[extension]
        place = (picture.at, picture.size, caption.at, caption.size)
        records.append((0, len(keys), len(encoded), *place))
        keys.extend(encoded)
        rows.append(dict(scalars(meta)))

    files: dict[str, Member] = {}
    key, climbs = "", False
    try:
        for member in members(file, size):
            path = PurePosixPath(member.name)
            stem, _, extension = path.name.partition(".")
            if not stem:  # a hidden file
                continue
            its_key = str(path.parent / stem)
            extension = extension.lower()
            if its_key != key or extension in files:
                if files:
                    take(key, files, climbs)
                key, files, climbs = its_key, {}, False
            files[extension] = member
            climbs |= path.is_absolute() or ".." in path.parts
        if files:
            take(key, files, climbs)
    except DamagedTar as error:
        # Whether the last sample had more files than were found, nobody can say: leave it out.
        damage = str(error)
        dropped[CUT_OFF] += 1
    return Index(
        records=np.array(records, RECORD),
        keys=bytes(keys),
        columns=columns_of(rows),
        dropped=dict(dropped),
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


# Where tars lie


def is_remote(path: str) -> bool:
    return "://" in path


def _open(path: str) -> IO[bytes]:
    return fsspec.open(path, "rb").open() if is_remote(path) else open(path, "rb")


def _fingerprint(path: str) -> tuple[str, int, str]:
    """The address, the size, and what changes when the file's content does."""
    if is_remote(path):
        system, within = fsspec.core.url_to_fs(path)
        return path, system.size(within), str(system.ukey(within))
    about = os.stat(path)
    return os.path.abspath(path), about.st_size, str(about.st_mtime_ns)


# A process keeps its last tars open. Reads name their offset, so that those opened before a fork
# may be shared by the workers.
@functools.lru_cache(OPEN_FILES)
def _opened(path: str, changed: str) -> io.FileIO:
    file = io.FileIO(path)
    if str(os.fstat(file.fileno()).st_mtime_ns) != changed:
        file.close()
        raise OSError(f"{path} has changed since it was indexed")
    return file


def _read(path: str, changed: str, start: int, end: int) -> bytes:
    """Some bytes of a tar. Raises OSError if it has gone or changed, or cannot be reached."""
    if not is_remote(path):
        content = os.pread(_opened(path, changed).fileno(), end - start, start)
    else:
        try:
            # Asked for anew each time: fsspec keeps the connection, and makes another after a fork.
            system, within = fsspec.core.url_to_fs(path)
            content = system.cat_file(within, start=start, end=end)
        except Exception as error:  # each kind of address has errors of its own
            raise OSError(f"{path} cannot be read: {error}") from error
    if len(content) != end - start:
        raise OSError(f"{path} ends before byte {end}: it has changed since it was indexed")
    return content


# A data set's index


class TarRows:
    """The complete samples of tars, as rows `{"captions", "image"}`.

    `image` is the encoded picture, `captions` a list of one or more.  Reading a row raises OSError
    if its tar has gone or changed.

    Args:
        files: paths or addresses of tars, in order.
        caption_key: the extension that holds the caption, or a key of the json (`json.caption`).
        where: a filter by the values of the json, or of the `.parquet` beside the tar that
            img2dataset writes; see `unclip.data.filters`.
        max_bad_share: of the samples, and of the tars, how many may be damaged.

    Raises:
        FileNotFoundError: a tar is not there.
        ValueError: no tar has the caption or what the filter names, or too much is damaged.
    """

    def __init__(
        self, files: Sequence[str], caption_key: str, where: str = "", max_bad_share: float = 1.0
    ) -> None:
        self.files = list(files)
        self._path = caption_key.split(".")[1:]
        # How a path goes through fsspec may need the network: ask for all at once.
        with ThreadPoolExecutor(32) as threads:
            prints = list(threads.map(_fingerprint, self.files))
        self._changed = [changed for _, _, changed in prints]
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "unclip_tars"
        beside = [_sidecar_time(file) for file in self.files] if where else []
        self._folder = cache / f"set-{_name_of(prints, caption_key, where, beside)}"
        if not (self._folder / "about.json").is_file():
            cache.mkdir(parents=True, exist_ok=True)
            # Of a machine's processes one does the work.
            with FileLock(cache / f".{self._folder.name}.lock"):
                if not (self._folder / "about.json").is_file():
                    parts = [cache / f"tar-{_name_of(p, caption_key)}.npz" for p in prints]
                    _index_missing(self.files, [size for _, size, _ in prints], parts, caption_key)
                    _join(self.files, parts, caption_key, where, self._folder)
        about = json.loads((self._folder / "about.json").read_text())
        self.dropped: dict[str, int] = about["dropped"]
        """Cause -> samples that were left out."""
        self._map()
        self._report(about["damage"], max_bad_share)

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
        dropped = sum(self.dropped.values())
        if dropped:
            causes = ", ".join(f"{count} {cause}" for cause, count in sorted(self.dropped.items()))
            logger.warning("dropped %d samples: %s", dropped, causes)
        bad = sum(n for cause, n in self.dropped.items() if cause not in LEFT_OUT)
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

    def key(self, index: int) -> tuple[str, str]:
        """The key of a row and the address of its tar; known even if the tar has gone."""
        tar, start, size, *_ = self._records[index].item()
        key = self._keys[start : start + size].tobytes().decode("utf-8", "surrogateescape")
        return key, self.files[tar]

    def __getitem__(self, index: int) -> dict[str, Any]:
        tar, _, _, image_at, image_size, caption_at, caption_size = self._records[index].item()
        spans = [(image_at, image_at + image_size), (caption_at, caption_at + caption_size)]
        path, changed = self.files[tar], self._changed[tar]
        start, end = min(spans)[0], max(spans)[1]
        if end - start <= image_size + caption_size + READ_TOGETHER:
            content = _read(path, changed, start, end)
            image, caption = (content[a - start : b - start] for a, b in spans)
        else:
            image, caption = (_read(path, changed, a, b) for a, b in spans)
        return {"captions": read_captions(caption, self._path), "image": image}


def _name_of(*what: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *what]).encode()).hexdigest()[:32]


def _index_missing(
    files: Sequence[str], sizes: Sequence[int], parts: Sequence[Path], caption_key: str
) -> None:
    """Index the tars that have none yet, several at a time."""
    todo = [k for k, part in enumerate(parts) if not part.is_file()]
    if not todo:
        return
    remote = is_remote(files[0])  # waits for the network, where the others wait for the processor
    pool: Callable[[int], Executor] = ThreadPoolExecutor if remote else ProcessPoolExecutor
    workers = 32 if remote else os.cpu_count() or 1
    job = functools.partial(_index_one, caption_key=caption_key)
    jobs = [(files[k], sizes[k], parts[k]) for k in todo]
    bar = functools.partial(tqdm, total=len(todo), desc="indexing", unit="tar", disable=None)
    if workers == 1 or (len(todo) < 8 and not remote):
        for arguments in bar(jobs):
            job(arguments)
        return
    with pool(min(workers, len(todo))) as executor:
        for _ in bar(executor.map(job, jobs, **({} if remote else {"chunksize": 4}))):
            pass


def _index_one(job: tuple[str, int, Path], caption_key: str) -> None:
    path, size, part = job
    index_tar(path, size, caption_key).save(part)


def _join(
    files: Sequence[str], parts: Sequence[Path], caption_key: str, where: str, folder: Path
) -> None:
    """Write the index of all tars, less what the filter leaves out, as flat files."""
    kept_by = Filter(where) if where else None
    dropped: Counter[str] = Counter()
    damage, fields, known, keys_end, found = {}, set(), set[str](), 0, 0
    with written_whole(folder) as out:
        with (out / "records").open("wb") as records_file, (out / "keys").open("wb") as keys_file:
            for number, (file, part) in enumerate(zip(files, parts, strict=True)):
                index = Index.load(part)
                dropped.update(index.dropped)
                fields.update(index.fields)
                found += len(index.records)
                if index.damage:
                    damage[file] = index.damage
                records = index.records
                if kept_by is not None:
                    columns = index.columns
                    if kept_by.names - columns.keys():
                        columns = _sidecar(file, index, kept_by.names) | columns
                    known.update(columns)
                    kept = kept_by(columns, len(records))
                    dropped[FILTERED] += int(len(kept) - kept.sum())
                    records = records[kept]
                records["tar"] = number
                records["key_at"] += keys_end
                keys_end += len(index.keys)
                records.tofile(records_file)
                keys_file.write(index.keys)
        if not found and caption_key not in fields and (fields or dropped.keys() <= set(LEFT_OUT)):
            raise ValueError(
                f"caption_key must name the captions in {files[0]}; got {caption_key!r}: "
                f"choose one of {', '.join(sorted(fields)) or '(there are none)'}"
            )
        if kept_by is not None and found:
            kept_by.check_names(known, "the samples' json")
        about = {"dropped": {cause: n for cause, n in dropped.items() if n}, "damage": damage}
        (out / "about.json").write_text(json.dumps(about))


def _sidecar_path(tar: str) -> str:
    return f"{tar.removesuffix('.tar')}.parquet"


def _sidecar_time(tar: str) -> int | None:
    path = _sidecar_path(tar)
    return os.stat(path).st_mtime_ns if os.path.isfile(path) else None


def _sidecar(tar: str, index: Index, names: set[str]) -> dict[str, Column]:
    """Columns of the Parquet file beside a tar, in the order of the tar's samples."""
    path = _sidecar_path(tar)
    if not os.path.isfile(path):
        return {}
    schema = pq.read_schema(path).names
    if "key" not in schema:
        return {}
    there = [name for name in schema if name in names]
    table = pq.read_table(path, columns=["key", *there]).to_pydict()
    row_of = {str(key): row for row, key in enumerate(table["key"])}
    ends = index.records["key_at"] + index.records["key_size"]
    spans = zip(index.records["key_at"].tolist(), ends.tolist(), strict=True)
    rows = [row_of.get(PurePosixPath(index.keys[a:b].decode()).name) for a, b in spans]
    picked = [{n: table[n][r] for n in there} if r is not None else {} for r in rows]
    return columns_of([{n: v for n, v in row.items() if v is not None} for row in picked])
