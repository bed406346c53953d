"""The order of samples, mixtures by weight, and filters."""

import io
import json
import logging
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import full_disk
from PIL import Image

from unclip.config import from_dict, parse
from unclip.data.filters import Filter, columns_of
from unclip.data.images import decode_image, to_tensor
from unclip.data.order import CYCLE, Order
from unclip.data.source import PartConfig, SourceConfig, open_source
from unclip.training.batches import GlobalBatches, loader


@pytest.fixture(autouse=True)
def cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(size=(8, 8), format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path, count: int, prefix: str = "", meta=lambda k: {}):
    with tarfile.open(path, "w") as tar:
        for k in range(count):
            files = {"png": picture(), "txt": f"{prefix}{k}".encode()}
            files["json"] = json.dumps(meta(k)).encode()
            for extension, data in files.items():
                info = tarfile.TarInfo(f"{prefix}{k:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


# --- order


@pytest.mark.parametrize("length", [1, 2, 3, 10, 101, 4096, 12_345])
def test_each_epoch_holds_each_sample_once_in_an_order_of_its_own(length):
    _, index, epoch = Order([length], seed=3)(np.arange(3 * length))
    assert epoch.tolist() == np.repeat([0, 1, 2], length).tolist()
    epochs = index.reshape(3, length)
    assert (np.sort(epochs, axis=1) == np.arange(length)).all()
    if length > 9:
        assert not (epochs[0] == epochs[1]).all()
        assert not (Order([length], seed=4)(np.arange(length))[1] == epochs[0]).all()


def test_the_order_is_even():
    """Of all permutations of 4 things each comes up as often, as far as chance allows."""
    _, index, _ = Order([4])(np.arange(4 * 24_000))
    orders = index.reshape(-1, 4) @ [64, 16, 4, 1]
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 24
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 23 + 5 * np.sqrt(46)


def test_neighbours_in_the_order_are_unrelated():
    _, index, _ = Order([100_000])(np.arange(20_000))
    assert abs(np.corrcoef(index[:-1], index[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(20_000), index)[0, 1]) < 0.03


def test_a_position_of_a_billion_samples_costs_nothing():
    _, index, epoch = Order([10**9])(np.array([900_000_000, 10**9]))
    assert epoch.tolist() == [0, 1] and (index >= 0).all() and (index < 10**9).all()


def test_a_mixture_keeps_to_its_weights_and_uses_each_sample_of_an_epoch_once():
    order = Order([3, 1000, 50_000], [1, 1, 2], seed=1)
    part, index, epoch = order(np.arange(2 * CYCLE))
    assert np.bincount(part[:CYCLE]).tolist() == [2500, 2500, 5000]
    for number, length in enumerate([3, 1000, 50_000]):
        mine = part == number
        pairs = epoch[mine] * length + index[mine]
        assert len(np.unique(pairs)) == mine.sum()  # nothing twice within an epoch
        full = epoch[mine] < mine.sum() // length
        assert full.sum() == mine.sum() // length * length  # and nothing left out
    with pytest.raises(ValueError, match="weight must be at least 1/10000 of the sum"):
        Order([3, 3], [1, 100_000])


# --- mixtures


def test_several_sources_mixed_by_weight(tmp_path):
    mix = [
        PartConfig(data=write_tar(tmp_path / "a.tar", 3, "a"), weight=1),
        PartConfig(data=write_tar(tmp_path / "b.tar", 50, "b"), weight=3, where="k >= 0"),
    ]
    with pytest.raises(ValueError, match="where must name keys of the samples' json; got 'k'"):
        open_source(SourceConfig(mix=mix))
    write_tar(tmp_path / "b.tar", 50, "b", meta=lambda k: {"k": k - 10})
    ds = open_source(SourceConfig(mix=mix, image_size=8))
    assert len(ds) == 43
    assert ds[2]["key"] == "a00002" and ds[3]["key"] == "b00010"

    def keys(world: int, workers: int, first: int, count: int) -> list[list[str]]:
        streams = []
        for rank in range(world):
            batches = GlobalBatches(
                ds,
                batch_size=8,
                micro_batch_size=8 // world,
                rank=rank,
                num_processes=world,
                first_batch=first,
                seed=5,
            )
            streams.append(iter(loader(ds, batches, workers)))
        # Of n processes each takes every n-th sample of a batch.
        batches = [
            zip(*(next(stream)["key"] for stream in streams), strict=True) for _ in range(count)
        ]
        return [[key for row in batch for key in row] for batch in batches]

    whole = keys(world=1, workers=0, first=0, count=6)
    assert keys(world=2, workers=2, first=0, count=6) == whole
    assert keys(world=4, workers=0, first=4, count=2) == whole[4:]
    flat = [key for batch in keys(1, 0, 0, 100) for key in batch]
    assert 0.2 < sum(key.startswith("a") for key in flat) / 800 < 0.3


def test_a_mixture_is_read_from_a_config_and_from_the_command_line(tmp_path):
    part = {"data": "x.tar", "weight": 2, "where": "a > 1"}
    expected = SourceConfig(mix=[PartConfig(data="x.tar", weight=2.0, where="a > 1")])
    assert from_dict(SourceConfig, {"mix": [part]}) == expected
    assert parse(SourceConfig, ["--mix", json.dumps([part])]) == expected
    assert parse(SourceConfig, ["--where", "width >= 256 and x in ['en']"]).where.endswith("]")
    with pytest.raises(ValueError, match="weight must be above 0; got -1"):
        PartConfig(data="x.tar", weight=-1)
    with pytest.raises(ValueError, match=r"source\.mix must name sources that end; got shapes"):
        SourceConfig(mix=[PartConfig(data="shapes")])


def test_fewer_samples_than_processes(tmp_path):
    ds = open_source(SourceConfig(data=write_tar(tmp_path / "a.tar", 3), image_size=8))
    with pytest.raises(ValueError, match="a sample for each of 4 processes; got 3: add data or"):
        GlobalBatches(ds, batch_size=4, micro_batch_size=1, rank=0, num_processes=4)


# --- filters


COLUMNS = {
    "width": np.array([10.0, 20.0, np.nan, 40.0]),
    "language": np.array(["en", "de", "en", ""]),
    "score": np.array(["1", "x", "3.5", ""]),
    "x.y": np.array([1.0, 0.0, 1.0, np.nan]),
}


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("width >= 20", [1, 3]),
        ("not width >= 20", [0, 2]),
        ("10 < width <= 40", [1, 3]),
        ("language == 'en'", [0, 2]),
        ("language != 'en'", [1]),
        ("language in ['en', 'fr'] and width < 15", [0]),
        ("language not in ('en',)", [1]),
        ("language == 'de' or x.y == True", [0, 1, 2]),
        ("score > 1", [2]),
        ("width > -1", [0, 1, 3]),
        ("absent > 1", []),
    ],
)
def test_filters(where, kept):
    assert np.flatnonzero(Filter(where)(COLUMNS, 4)).tolist() == kept


@pytest.mark.parametrize(
    "where",
    ["width", "width >", "__import__('os')", "width + 1 > 2", "width > f(1)", "a in b", "a is 1"],
)
def test_what_is_no_filter_is_refused(where):
    with pytest.raises(ValueError, match="where must be a comparison of keys; got "):
        Filter(where)
    with pytest.raises(ValueError, match="where must be a comparison of keys; got "):
        SourceConfig(where=where)


def test_values_of_several_kinds_become_columns():
    columns = columns_of([{"a": 1, "b": "x", "long": "x" * 100}, {"a": True}, {"b": 2}])
    assert columns["a"][:2].tolist() == [1.0, 1.0] and np.isnan(columns["a"][2])
    assert columns["b"].tolist() == ["x", "", "2"]
    assert columns.keys() == {"a", "b"}


def test_the_json_of_a_tar_filters_it(tmp_path, caplog):
    meta = {"aesthetic": 5.0, "more": {"language": "en"}}
    data = write_tar(tmp_path / "a.tar", 6, meta=lambda k: meta if k % 2 else {"aesthetic": k})
    ds = open_source(SourceConfig(data=data, where="aesthetic >= 4 and not aesthetic > 4.5"))
    assert [ds[i]["key"] for i in range(len(ds))] == ["00004"]
    assert "5 outside the filter" in caplog.text
    assert len(open_source(SourceConfig(data=data, where="more.language == 'en'"))) == 3
    with pytest.raises(ValueError, match="got 'aestetic': did you mean 'aesthetic'"):
        open_source(SourceConfig(data=data, where="aestetic > 5"))
    with pytest.raises(ValueError, match=r"got none in .* \(6 outside the filter\)"):
        open_source(SourceConfig(data=data, where="aesthetic > 100"))


def test_the_output_of_img2dataset_as_it_comes(tmp_path):
    """Tars, with a Parquet file of all rows (those that failed too) and counts beside each."""
    write_tar(tmp_path / "00000.tar", 4)
    table = {
        "key": [f"{k:05d}" for k in (3, 2, 9, 1, 0)],
        "similarity": [0.3, 0.2, 0.9, None, 0.0],
        "status": ["success", "success", "failed_to_download", "success", "success"],
    }
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert len(open_source(SourceConfig(data=str(tmp_path)))) == 4
    ds = open_source(SourceConfig(data=str(tmp_path), where="similarity >= 0.2"))
    assert [ds[i]["key"] for i in range(len(ds))] == ["00002", "00003"]


def test_img2datasets_parquet_with_pictures(tmp_path):
    table = {"jpg": [picture(), None, picture()], "caption": ["a", "b", "c"], "width": [1, 2, 3]}
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    ds = open_source(SourceConfig(data=str(tmp_path)))
    assert [ds[i]["caption"] for i in range(len(ds))] == ["a", "c"]
    ds = open_source(SourceConfig(data=str(tmp_path), where="width > 1"))
    assert [ds[i]["caption"] for i in range(len(ds))] == ["c"]
    assert ds.dropped == {"no picture": 1, "outside the filter": 1}
    with pytest.raises(ValueError, match=r"where must name keys of rows of .*; got 'height'"):
        open_source(SourceConfig(data=str(tmp_path), where="height > 1"))


def test_a_folder_is_filtered_by_its_captions_file_or_the_json_beside(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(picture())
        (tmp_path / f"{k}.txt").write_text(f"c{k}")
        (tmp_path / f"{k}.json").write_text(json.dumps({"width": k}))
    ds = open_source(SourceConfig(data=str(tmp_path), where="width >= 1"))
    assert [ds[i]["caption"] for i in range(len(ds))] == ["c1", "c2"]
    (tmp_path / "captions.csv").write_text("file_name,caption,score\n0.png,a,7\n1.png,b,2\n")
    ds = open_source(SourceConfig(data=str(tmp_path), where="score > 5"))
    assert [ds[i]["caption"] for i in range(len(ds))] == ["a"]


def test_a_caption_beside_a_picture_that_is_not_utf8(tmp_path, caplog):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(picture())
        (tmp_path / f"{k}.txt").write_bytes(b"\xe9" if k == 1 else b"ok")
    ds = open_source(SourceConfig(data=str(tmp_path)))
    assert len(ds) == 2 and ds.dropped == {"caption not in UTF-8 or no valid json": 1}
    with pytest.raises(ValueError, match=r"got 1 of 3 that are not \(1 caption not .*\(0.2\)"):
        open_source(SourceConfig(data=str(tmp_path), max_bad_share=0.2))


# --- what is drawn for a sample


def folder_of(tmp_path, *pictures: bytes) -> str:
    for k, data in enumerate(pictures):
        (tmp_path / f"{k}.png").write_bytes(data)
        (tmp_path / f"{k}.txt").write_text(f"c{k}")
    return str(tmp_path)


def test_a_decompression_bomb_is_not_decoded(tmp_path, caplog):
    bomb = picture((2000, 2000), "PNG", optimize=True)
    assert len(bomb) < 20_000
    data = folder_of(tmp_path, picture(), bomb, picture())
    ds = open_source(SourceConfig(data=data, max_pixels=1_000_000))
    assert [ds[i]["key"] for i in range(3)] == ["0.png", "2.png", "2.png"]
    assert ds.skips["picture above max_pixels"] == 1
    assert "2000 x 2000 pixels, above max_pixels 1000000" in caplog.text


def test_long_pictures_are_skipped_without_ado(tmp_path, caplog):
    data = folder_of(tmp_path, picture(), picture((30, 8)), picture((8, 30)), picture((16, 8)))
    ds = open_source(SourceConfig(data=data, max_aspect=2, max_bad_share=0))
    assert [ds[i]["key"] for i in range(4)] == ["0.png", "3.png", "3.png", "3.png"]
    assert ds.skips["picture above max_aspect"] == 2
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    long = tmp_path / "long"
    long.mkdir()
    ds = open_source(SourceConfig(data=folder_of(long, picture((30, 8))), max_aspect=2))
    with pytest.raises(ValueError, match="max_aspect must leave some pictures; got 2,"):
        ds[0]


def test_pictures_that_are_long_by_their_metadata_are_never_drawn(tmp_path):
    """In the json of a tar, the columns of a table, or beside a picture; unknown sizes pass."""
    sides = [{"width": 30, "height": 8}, {"width": 8, "height": 8}, {}, {"width": 8, "height": 17}]
    tar = write_tar(tmp_path / "a.tar", 4, meta=lambda k: sides[k])
    folder = tmp_path / "folder"
    folder.mkdir()
    for k, side in enumerate(sides):
        (folder / f"{k}.png").write_bytes(picture())
        (folder / f"{k}.txt").write_text(f"c{k}")
        (folder / f"{k}.json").write_text(json.dumps(side))
    table = {name: [side.get(name) for side in sides] for name in ("width", "height")}
    table |= {"jpg": [picture()] * 4, "caption": ["c0", "c1", "c2", "c3"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    for data in (tar, folder, tmp_path / "a.parquet"):
        ds = open_source(SourceConfig(data=str(data), image_size=8, max_aspect=2, max_bad_share=0))
        assert [ds[k]["caption"][-1] for k in range(len(ds))] == ["1", "2"]
        assert ds.dropped == {"picture above max_aspect": 2}
        assert len(open_source(SourceConfig(data=str(data), image_size=8, max_aspect=9))) == 4


def test_an_index_that_cannot_be_written_leaves_nothing(tmp_path):
    tar = write_tar(tmp_path / "a.tar", 20)
    with full_disk(500), pytest.raises(OSError, match="File too large"):
        open_source(SourceConfig(data=tar))
    assert not [f for f in (tmp_path / "cache/unclip_tars").iterdir() if f.name != ".lock"]
    assert len(open_source(SourceConfig(data=tar))) == 20


def test_crop_flip_and_caption_depend_on_seed_epoch_and_number_alone(tmp_path):
    ramp = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8)[None].repeat(8, 0))
    buffer = io.BytesIO()
    ramp.convert("RGB").save(buffer, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in {
            "k.png": buffer.getvalue(),
            "k.json": json.dumps({"captions": ["one", " two ", "", "three"]}).encode(),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    config = SourceConfig(
        data=str(tmp_path / "a.tar"),
        image_size=8,
        caption_key="json.captions",
        caption_choice="random",
        crop="random",
        flip=True,
    )
    ds = open_source(config)
    assert ds.varies_by_epoch
    seen = [ds[0, epoch] for epoch in range(40)]
    for epoch, sample in enumerate(seen):
        assert (ds[0, epoch]["image"] == sample["image"]).all()
    assert {sample["caption"] for sample in seen} == {"one", "two", "three"}
    rising = [bool((s["image"][0, 0].diff() > 0).all()) for s in seen]
    falling = [bool((s["image"][0, 0].diff() < 0).all()) for s in seen]
    assert (
        any(rising) and any(falling) and all(a != b for a, b in zip(rising, falling, strict=True))
    )
    assert len({round(s["image"].mean().item(), 3) for s in seen}) > 5
    plain = open_source(SourceConfig(data=config.data, image_size=8, caption_key="json.captions"))
    assert not plain.varies_by_epoch and plain[0]["caption"] == "one"


def test_jpegs_may_be_decoded_smaller_and_look_the_same(tmp_path):
    y, x = np.mgrid[0:512, 0:512] / 512
    pixels = np.stack([x, y, np.sin(9 * x) / 2 + 0.5], -1) * 255
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    small = decode_image(buffer.getvalue(), draft=32)
    assert small.size == (64, 64)
    whole = decode_image(buffer.getvalue())
    assert whole.size == (512, 512)
    assert (to_tensor(small, 32) - to_tensor(whole, 32)).abs().mean() < 0.02
