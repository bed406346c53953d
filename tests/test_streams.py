"""Tars that are read shard after shard, at addresses that fail at times, and where indices lie."""

import gzip
import io
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import datasets
import fsspec
import numpy as np
import pytest
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem
from test_order import write_tar

from unclip.data import storage, tars
from unclip.data.order import Order, Shards
from unclip.data.source import PartConfig, SourceConfig, open_source
from unclip.training.batches import GlobalBatches, loader
from unclip.training.prior import spread_rows


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)


def write_packed(path: Path, count: int, prefix: str = "", **options: Any) -> Path:
    """A compressed tar."""
    plain = path.with_suffix(".plain")
    write_tar(plain, count, prefix, **options)
    path.write_bytes(gzip.compress(plain.read_bytes(), 1))
    plain.unlink()
    return path


@pytest.fixture
def packed(tmp_path):
    """Seven compressed tars of 3 to 9 samples, 42 in all."""
    folder = tmp_path / "packed"
    folder.mkdir()
    for shard in range(7):
        write_packed(
            folder / f"{shard}.tar.gz", 3 + shard, f"{shard}-", meta=lambda k: {"width": k}
        )
    return folder


def source(data: Any, **options: Any) -> Any:
    options = {"image_size": 8, "shuffle_streams": 4, "shuffle_buffer": 5} | options
    return open_source(SourceConfig(data=str(data), **options))


def keys_of(dataset: Any, *, world: int = 1, workers: int = 0, first: int = 0, count: int) -> Any:
    """The keys of global batches of 6, in the order of their positions."""
    streams = []
    for rank in range(world):
        batches = GlobalBatches(
            dataset,
            batch_size=6,
            micro_batch_size=6 // world,
            rank=rank,
            num_processes=world,
            first_batch=first,
            seed=3,
        )
        streams.append(iter(loader(dataset, batches, workers)))
    groups = [zip(*(next(s)["key"] for s in streams), strict=True) for _ in range(count)]
    return [[key for row in group for key in row] for group in groups]


# --- the order


@pytest.mark.parametrize("sizes", [[1], [5, 0, 7], [3] * 40, [100, 1, 1], [0, 0, 250, 250]])
@pytest.mark.parametrize("streams", [1, 4, 16])
@pytest.mark.parametrize("buffer", [1, 10, 1000])
def test_each_epoch_holds_each_sample_once(sizes, streams, buffer):
    length = sum(sizes)
    order = Order([length], seed=1, shards=[Shards(sizes, streams, buffer)])
    _, index, epoch = order(np.arange(2 * length))
    assert epoch.tolist() == np.repeat([0, 1], length).tolist()
    assert (np.sort(index.reshape(2, length), axis=1) == np.arange(length)).all()
    part = slice(length // 3, length)  # from any position on
    assert (order(np.arange(2 * length)[part])[1] == index[part]).all()
    if length > 50 and buffer > 1:
        assert not (index[:length] == index[length:]).all()


def test_few_shards_are_in_use_at_a_time_and_ranks_have_streams_of_their_own():
    sizes, streams, buffer = [100] * 400, 8, 50
    shard_of = np.repeat(np.arange(400), 100)
    order = Order([40_000], seed=1, shards=[Shards(sizes, streams, buffer)])
    shards = shard_of[order(np.arange(40_000))[1]]
    for start in range(0, 40_000, 400):  # half of what a stream's shard holds
        assert len(np.unique(shards[start : start + 400])) <= 3 * streams
    # A rank in four reads a quarter of the shards, but for those that two streams share.
    assert len(np.unique(shards[::4])) <= 100 + streams
    # A mixture shuffles a part the same way.
    mixed = Order([40_000, 9], [1, 1], seed=1, shards=[Shards(sizes, streams, buffer), None])
    part, index, epoch = mixed(np.arange(80_000))
    assert sorted(index[(part == 0) & (epoch == 0)].tolist()) == list(range(40_000))


def test_statistics_are_measured_on_what_is_read_first(packed):
    ds = source(packed, limit=40)
    rows = spread_rows(ds, 12)
    first = keys_of_seed(ds, 0)
    assert [ds[row]["key"] for row in rows] == first
    assert spread_rows(source(write_tar(packed.parent / "p.tar", 10)), 5) == [0, 2, 4, 6, 8]


def keys_of_seed(dataset: Any, seed: int) -> list[str]:
    batches = GlobalBatches(
        dataset, batch_size=12, micro_batch_size=12, rank=0, num_processes=1, seed=seed
    )
    return next(iter(loader(dataset, batches, 0)))["key"]


# --- compressed tars


def test_compressed_tars_are_read_like_others(packed, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in packed.iterdir():
        (plain / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    ds, same = source(packed), source(plain)
    assert len(ds) == len(same) == 42
    for k in range(42):
        assert (ds[k]["image"] == same[k]["image"]).all()
        assert (ds[k]["key"], ds[k]["caption"]) == (same[k]["key"], same[k]["caption"])
    assert ds.shards is not None and same.shards is None
    assert source(plain, stream=True).shards.sizes.tolist() == ds.shards.sizes.tolist()
    (packed / "0.tar.gz").rename(packed / "0.tgz")
    assert len(source(packed / "0.tgz")) == 3


def test_filters_and_limits_of_compressed_tars(packed):
    ds = source(packed, where="width >= 5")
    assert ds.shards.sizes.tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert ds.dropped == {"outside the filter": 32}
    flat = [key for batch in keys_of(ds, count=5) for key in batch]
    assert all(int(key.split("-")[1]) >= 5 for key in flat)
    assert len(set(flat[:10])) == 10
    few = source(packed, limit=8)
    flat = [key for batch in keys_of(few, count=4) for key in batch]
    assert len(set(flat[:8])) == len(set(flat)) == 8


@pytest.mark.parametrize("mixed", [False, True])
def test_a_resume_on_other_numbers_of_ranks_and_workers_is_exact(packed, tmp_path, mixed):
    if mixed:
        plain = write_tar(tmp_path / "b.tar", 20, "b")
        mix = [PartConfig(data=str(packed), weight=2), PartConfig(data=plain, weight=1)]
        settings = {"image_size": 8, "shuffle_streams": 4, "shuffle_buffer": 5}
        ds = open_source(SourceConfig(mix=mix, **settings))  # type: ignore[arg-type]
    else:
        ds = source(packed)
    whole = keys_of(ds, count=14)
    assert keys_of(ds, world=2, workers=2, first=3, count=4) == whole[3:7]
    assert keys_of(ds, world=3, workers=0, first=7, count=4) == whole[7:11]
    assert keys_of(ds, world=1, workers=3, first=11, count=3) == whole[11:]
    flat = [key for batch in whole for key in batch]
    if mixed:
        assert 20 < sum(key.startswith("b") for key in flat) < 36
    else:
        assert len(set(flat[:42])) == 42  # an epoch
        assert flat[:42] != sorted(flat[:42])


def test_copies_keep_to_their_room(packed, tmp_path, caplog):
    one = len(gzip.decompress((packed / "6.tar.gz").read_bytes()))
    storage._opened_copy.cache_clear()
    storage._warn_of_room.cache_clear()
    keys = keys_of(source(packed, copies_gb=2.5 * one / 1e9), count=7)
    folder = tmp_path / "cache/unclip_tars/copies"
    with FileLock(folder / ".room.lock"):  # reading ahead goes on, and takes copies away
        sizes = [copy.stat().st_size for copy in folder.glob("*.tar")]
    assert sizes and sum(sizes) <= 2.5 * one
    assert keys == keys_of(source(packed), count=7)
    assert sum("raise it, or lower shuffle_streams" in r.getMessage() for r in caplog.records) == 1
    with pytest.raises(ValueError, match="copies_gb must be above 0; got 0"):
        source(packed, copies_gb=0)


def test_a_compressed_tar_that_is_cut_off(packed, caplog):
    whole = (packed / "6.tar.gz").read_bytes()
    (packed / "6.tar.gz").write_bytes(whole[: len(whole) // 2])
    ds = source(packed)
    assert 33 < len(ds) < 41
    assert "6.tar.gz is damaged: Compressed file ended before" in caplog.text
    assert ds.dropped == {"cut off by the tar's end": 1}
    assert ds[len(ds) - 1]["key"].startswith("6-")  # what lies before is used
    assert ds.skips["file that has gone or changed"] == 0
    (packed / "6.tar.gz").write_bytes(b"no gzip at all" * 100)
    assert len(source(packed)) == 33


def test_a_compressed_tar_that_vanishes_or_changes(packed):
    ds = source(packed)
    (packed / "1.tar.gz").unlink()
    assert ds[3]["key"] == "2-00000"  # four are gone
    os.utime(packed / "6.tar.gz", ns=(0, 0))
    assert ds[41]["key"] == "0-00000"
    assert ds.skips["file that has gone or changed"] == 5
    assert "has changed since" in ds.skipped["6-00008"]


# --- where indices lie


def indexed(monkeypatch) -> list[str]:
    """The tars that are indexed from now on."""
    seen: list[str] = []
    index_tar = tars.index_tar

    def watched(source, caption_key):
        seen.append(Path(source.path).name)
        return index_tar(source, caption_key)

    monkeypatch.setattr(tars, "index_tar", watched)
    return seen


def test_an_index_beside_its_tars_moves_with_them(tmp_path, monkeypatch):
    seen = indexed(monkeypatch)
    folder = tmp_path / "here"
    folder.mkdir()
    for k in range(2):
        write_tar(folder / f"{k}.tar", 2, f"{k}-")
    assert len(source(folder, index_beside=True)) == 4
    assert not (tmp_path / "cache").exists()
    assert len(list((folder / ".unclip_index").glob("tar-*.npz"))) == 2
    moved = folder.rename(tmp_path / "there")
    assert source(moved, index_beside=True)[3]["key"] == "1-00001"
    assert seen == ["0.tar", "1.tar"]
    write_tar(moved / "1.tar", 3, "n")
    assert len(source(moved, index_beside=True)) == 5
    assert seen == ["0.tar", "1.tar", "1.tar"]
    assert len(list((moved / ".unclip_index").glob("tar-*.npz"))) == 2
    assert len(list((moved / ".unclip_index").glob("set-*"))) == 1


def test_an_index_goes_into_the_cache_where_the_folder_cannot_be_written(tmp_path, caplog):
    folder = tmp_path / "here"
    folder.mkdir()
    write_tar(folder / "0.tar", 2)
    (folder / ".unclip_index").write_text("in the way")
    assert len(source(folder, index_beside=True)) == 2
    assert "cannot be written: the index goes into the cache" in caplog.text
    assert list((tmp_path / "cache/unclip_tars").glob("tar-*.npz"))


def test_a_tar_changed_in_place_is_indexed_anew(tmp_path, monkeypatch):
    seen = indexed(monkeypatch)
    tar = Path(write_tar(tmp_path / "a.tar", 4, "a"))
    size = tar.stat().st_size
    assert [source(tar)[k]["caption"] for k in range(4)] == ["a0", "a1", "a2", "a3"]
    write_tar(tar, 4, "b")
    assert tar.stat().st_size == size
    assert [source(tar)[k]["caption"] for k in range(4)] == ["b0", "b1", "b2", "b3"]
    assert seen == ["a.tar", "a.tar"]


def test_indices_that_nobody_uses_go(tmp_path):
    for name in ("a", "b", "c"):
        write_tar(tmp_path / f"{name}.tar", 2, name)
    cache = tmp_path / "cache/unclip_tars"
    source(tmp_path / "a.tar")
    for entry in cache.iterdir():
        os.utime(entry, (0, 0))
    source(tmp_path / "b.tar")
    assert len(list(cache.glob("tar-*"))) == len(list(cache.glob("set-*"))) == 1
    source(tmp_path / "c.tar")
    assert len(list(cache.glob("tar-*"))) == len(list(cache.glob("set-*"))) == 2


# --- addresses that fail


class Flaky(MemoryFileSystem):
    """Files in memory; a number of reads fail."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _fail(self) -> None:
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise ConnectionResetError("connection reset by peer")

    def cat_file(self, *args: Any, **options: Any) -> bytes:
        self._fail()
        return super().cat_file(*args, **options)

    def _open(self, *args: Any, **options: Any) -> Any:
        self._fail()
        return super()._open(*args, **options)

    def info(self, *args: Any, **options: Any) -> Any:
        self._fail()
        return super().info(*args, **options)


@pytest.fixture
def flaky(tmp_path) -> Iterator[str]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.failures = 0
    for k in range(2):
        plain = Path(write_tar(tmp_path / f"{k}.tar", 3, f"{k}-"))
        Flaky().pipe(f"/{k}.tar", plain.read_bytes())
    yield "flaky:///*.tar"
    Flaky.failures = 0


@pytest.mark.parametrize("stream", [False, True])
def test_reads_that_fail_are_tried_again(flaky, stream):
    Flaky.failures = 2
    ds = source(flaky, stream=stream)
    Flaky.failures = 3
    assert ds[4]["key"] == "1-00001"
    assert Flaky.failures == 0 and sum(ds.skips.values()) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_reads_that_go_on_failing_are_counted_as_bad_samples(flaky, stream, caplog):
    ds = source(flaky, stream=stream, max_bad_share=0.5)
    Flaky.failures = storage.ATTEMPTS
    assert ds[0]["key"] == "0-00001"  # the next stands in
    assert ds.skips["address that cannot be reached"] == 1
    assert "flaky:///0.tar cannot be read, asked 5 times: connection reset by peer" in caplog.text
    Flaky.failures = 10**9
    with pytest.raises(ValueError, match=r"got 4 of 6 that cannot, .*flaky:///[01].tar cannot be"):
        ds[3]


def test_an_address_that_cannot_be_opened_is_named(flaky):
    Flaky.failures = 10**9
    with pytest.raises(OSError, match=r"flaky:///.*0.tar cannot be read, asked 5 times: "):
        source("flaky:///0.tar")
    with pytest.raises(ValueError, match=r"data at needless:// needs a package .*no_such_package"):
        fsspec.register_implementation("needless", "no_such_package.System")
        source("needless://a/0.tar")


class Server(BaseHTTPRequestHandler):
    """Serves files from `folder`; every so many requests fail; ranges are given if `ranges`."""

    folder = Path()
    ranges = True
    fail_every = 0
    asked = 0

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, body: bool) -> None:
        Server.asked += 1
        path = self.folder / self.path.lstrip("/")
        if self.fail_every and Server.asked % self.fail_every == 0:
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        whole = len(data)
        self.protocol_version = "HTTP/1.0"
        span = self.headers.get("Range")
        if span and self.ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) if last else whole - 1, whole - 1)
            data, status = data[start : end + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(packed, monkeypatch) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")
    for k in range(2):
        write_tar(packed / f"plain-{k}.tar", 4, f"{k}-")
    monkeypatch.setattr(Server, "folder", packed)
    monkeypatch.setattr(Server, "fail_every", 0)
    monkeypatch.setattr(Server, "ranges", True)
    monkeypatch.setattr(Server, "asked", 0)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_tars_on_a_web_server_that_fails_at_times(server, packed, monkeypatch, ranges, caplog):
    monkeypatch.setattr(Server, "ranges", ranges)
    monkeypatch.setattr(Server, "fail_every", 4)
    ds = source(f"{server}/plain-{{0..1}}.tar")
    assert (ds.shards is None) == ranges  # a server that gives whole files only is read so
    assert [ds[k]["key"] for k in range(8)] == [f"{k}-{n:05d}" for k in range(2) for n in range(4)]
    packed_there = source(f"{server}/{{0..6}}.tar.gz")
    flat = [key for batch in keys_of(packed_there, count=7) for key in batch]
    assert len(set(flat)) == 42
    assert sum(ds.skips.values()) == sum(packed_there.skips.values()) == 0
    assert not [r for r in caplog.records if r.name.startswith("unclip") and r.levelno > 20]


def test_a_tar_that_vanishes_from_a_web_server(server, packed):
    ds = source(f"{server}/plain-{{0..1}}.tar")
    (packed / "plain-0.tar").unlink()
    assert ds[0]["key"] == "1-00000"
    assert ds.skips["file that has gone or changed"] == 4
    with pytest.raises(FileNotFoundError, match=r"no file matches 'http://.*/gone.tar'"):
        source(f"{server}/gone.tar")


def test_the_parquet_beside_a_remote_tar_filters_it(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    system = fsspec.filesystem("memory")
    system.pipe("/laion/0.tar", Path(write_tar(tmp_path / "0.tar", 4)).read_bytes())
    pq.write_table(
        pa.table({"key": [f"{k:05d}" for k in range(4)], "score": [1.0, 2.0, 3.0, 4.0]}),
        tmp_path / "0.parquet",
    )
    system.pipe("/laion/0.parquet", (tmp_path / "0.parquet").read_bytes())
    ds = source("memory://laion/*.tar", where="score > 2.5")
    assert [ds[k]["key"] for k in range(len(ds))] == ["00002", "00003"]
    system.rm("/laion", recursive=True)


def test_a_forward_file_seeks_on_and_a_little_back():
    file = storage.Forward(io.BytesIO(bytes(range(100))))
    assert file.read(10) == bytes(range(10)) and file.seek(4) == 4
    assert file.read(10) == bytes(range(4, 14)) and file.tell() == 14
    assert file.seek(90) == 90 and file.read(20) == bytes(range(90, 100))
    assert file.seek(500) == 100
