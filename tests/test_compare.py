"""Two results held against each other, with bootstrap intervals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from result_folders import spoil, write_result

from unclip.evaluation import metrics
from unclip.evaluation.compare import compare, main
from unclip.evaluation.intervals import percentile_interval, resampled
from unclip.evaluation.prior import frechet_distance
from unclip.evaluation.redrawn import cmmd_to, frechet_to, kid_to, precision_to, recall_to
from unclip.evaluation.results import Result, read_result

RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=80)


def scored(folder: Path, scores, **more) -> Result:
    return read_result(write_result(folder, {"clip_score": list(scores)}, **more))


def featured(folder: Path, drawn: np.ndarray, real: np.ndarray, **settings) -> Result:
    value = frechet_distance(torch.from_numpy(drawn), torch.from_numpy(real))
    metric = {"value": value, "better": "lower", "count": len(drawn), "settings": settings}
    features = {"clip": {"features": drawn, "reference": real}}
    scores = {"oracle_all": [True] * len(drawn)}
    return read_result(write_result(folder, scores, features=features, metrics={"fd_clip": metric}))


def only(a: Result, b: Result, metric: str = "clip_score", **options):
    (found,) = [d for d in compare(a, b, **options).differences if d.metric == metric]
    return found


# --- the bootstrap --------------------------------------------------------------------------------


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = resampled(lambda rows: values[rows].mean(), 400, resamples=2000)
    low, high = percentile_interval(values.mean(), found)
    expected = 2 * 1.96 * values.std() / 20
    assert high - low == pytest.approx(expected, rel=0.1)
    assert low < values.mean() < high


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng, hits = np.random.default_rng(2), 0
    for trial in range(200):
        values = rng.normal(1.0, size=60)
        found = resampled(lambda r, v=values: v[r].mean(), 60, resamples=200, seed=trial)
        low, high = percentile_interval(values.mean(), found)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_centred_interval_lies_around_its_value() -> None:
    found = np.linspace(10, 12, 101)  # the resamples lie far above the value
    assert percentile_interval(1.0, found, centred=True) == pytest.approx((0.05, 1.95))
    assert percentile_interval(1.0, found)[0] > 10


# --- means ----------------------------------------------------------------------------------------


def test_a_known_difference_lies_within_its_interval(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", NOISE)
    b = scored(tmp_path / "b", NOISE + 0.5 + 0.1 * RNG.normal(size=80))
    found = only(a, b)
    assert found.paired and found.verdict == "B"
    assert found.interval[0] < 0.5 < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.1, "paired: the noise of pictures cancels"
    assert only(b, a).verdict == "A"


def test_a_folder_with_itself_differs_by_nothing(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", NOISE)
    found = only(a, a)
    assert found.difference == 0 and found.interval == (0, 0) and found.verdict == ""


def test_other_captions_are_not_paired(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", NOISE)
    b = scored(tmp_path / "b", NOISE + 0.5, captions=[f"other {k}" for k in range(80)])
    comparison = compare(a, b)
    assert not comparison.paired and not only(a, b).paired
    low, high = only(a, b).interval
    assert low < 0.5 < high and high - low > 0.4


def test_scores_that_some_pictures_lack_are_left_out(tmp_path: Path) -> None:
    a = scored(tmp_path / "a", [1.0, None, 3.0, None])
    b = scored(tmp_path / "b", [2.0, None, 4.0, None])
    assert only(a, b).difference == 1 and only(a, b).interval == pytest.approx((1, 1))


def test_what_was_not_computed_or_otherwise_is_said(tmp_path: Path) -> None:
    null = {"fid": {"value": None, "better": "lower", "count": 0, "reason": "no weights"}}
    kid = {"kid": {"value": 0.1, "better": "lower", "count": 80, "settings": {"std": 0.3}}}
    a = scored(tmp_path / "a", NOISE, metrics=null | kid)
    kid["kid"]["settings"] = {"std": 0.4}
    b = scored(tmp_path / "b", NOISE, metrics=null | kid)
    assert only(a, b, "fid").note == "not computed for either"
    assert only(a, b, "kid").difference == 0, "its deviation is an outcome, no setting"
    assert "holds no features of inception" in only(a, b, "kid").note
    metric = replace(b.metrics["clip_score"], weights={"clip": "1" * 64})
    other = replace(b, metrics={**b.metrics, "clip_score": metric})
    assert only(a, other).difference is None
    assert "measured differently: weights.clip" in only(a, other).note
    alone = replace(b, metrics={"clip_score": metric})
    assert only(a, alone, "fid").note.startswith("not computed")


def test_scores_that_do_not_make_the_metric_give_no_interval(tmp_path: Path) -> None:
    odd = {"clip_score": {"value": 7.0, "better": "higher", "count": 80, "settings": {}}}
    a = scored(tmp_path / "a", NOISE, metrics=odd)
    found = only(a, a)
    assert found.interval is None and "not 7" in found.note


# --- distances ------------------------------------------------------------------------------------


def test_the_distances_are_those_of_the_metrics() -> None:
    rng = np.random.default_rng(3)
    for count in (5, 40):  # fewer pictures than dimensions, and more
        drawn, real = rng.normal(0.3, size=(count, 8)), rng.normal(size=(60, 8))
        rows = rng.integers(count, size=count)
        expected = frechet_distance(torch.from_numpy(drawn[rows]), torch.from_numpy(real))
        assert frechet_to(real, drawn)(rows) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (drawn[rows], real)]
        means = [
            np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean()
            for x, y in ((units[0], units[0]), (units[1], units[1]), (units[0], units[1]))
        ]
        expected = 1000 * (means[0] + means[1] - 2 * means[2])
        assert cmmd_to(real, drawn)(rows) == pytest.approx(expected, abs=1e-8)


def test_kid_precision_and_recall_are_those_of_the_metrics() -> None:
    rng = np.random.default_rng(3)
    drawn, real = rng.normal(0.3, size=(60, 4)), rng.normal(size=(60, 4))
    tensors = torch.from_numpy(drawn), torch.from_numpy(real)
    kid, _ = metrics.kid(*tensors, subsets=1, subset_size=60)
    every = np.arange(60)
    assert kid_to(real, drawn)(every) == pytest.approx(kid, rel=1e-6)
    precision, recall = metrics.precision_recall(*tensors)
    assert precision_to(real, drawn, 3)(every) == pytest.approx(precision)
    assert recall_to(real, drawn, 3)(every) == pytest.approx(recall)


def test_a_picture_drawn_twice_is_no_pair_and_no_neighbour() -> None:
    rng = np.random.default_rng(6)
    drawn, real = rng.normal(size=(30, 4)), rng.normal(size=(40, 4))
    half, twice = np.arange(15), np.repeat(np.arange(15), 2)
    for statistic in (kid_to(real, drawn), recall_to(real, drawn, 3)):
        assert statistic(twice) == pytest.approx(statistic(half))
    # So KID's resamples lie around its value: with copies for pairs they would lie above.
    far = rng.normal(1.0, size=(200, 4))
    kid = kid_to(real, far)
    found = resampled(kid, 200, resamples=300)
    assert abs(found.mean() - kid(np.arange(200))) < 0.2 * found.std()


def test_distances_are_resampled_over_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    real, drawn = rng.normal(size=(300, 4)), rng.normal(size=(200, 4))
    a = featured(tmp_path / "a", drawn, real)
    near = featured(tmp_path / "near", drawn + 0.001, real)
    far = featured(tmp_path / "far", drawn + 1.0, real)
    assert only(a, a, "fd_clip").interval == pytest.approx((0, 0))
    found = only(a, far, "fd_clip")
    assert found.paired and found.verdict == "A"
    assert found.interval[0] < 4.0 < found.interval[1], "|shift|^2 in four dimensions"
    assert only(a, near, "fd_clip").interval[0] < only(a, near, "fd_clip").difference
    assert "not asked for" in only(a, far, "fd_clip", distance_resamples=0).note


def test_what_is_made_up_and_what_is_missing_have_intervals(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    real = rng.normal(size=(150, 3))

    def result(name: str, drawn: np.ndarray) -> Result:
        sets = torch.from_numpy(drawn), torch.from_numpy(real)
        values = dict(zip(("precision", "recall"), metrics.precision_recall(*sets), strict=True))
        values["inception_score"] = 3.0
        known = {"better": "higher", "count": len(drawn), "settings": {"neighbours": 3}}
        return read_result(
            write_result(
                tmp_path / name,
                {"clip_score": [1.0] * len(drawn)},
                features={"clip": {"features": drawn, "reference": real}},
                metrics={key: {**known, "value": value} for key, value in values.items()},
                protocol={"settings": {"precision_recall_encoder": "clip"}},
            )
        )

    all_of_it = result("all", rng.normal(size=(150, 3)))
    one_mode = result("mode", 0.1 * rng.normal(size=(150, 3)))
    wild = result("wild", 3 * rng.normal(size=(150, 3)))
    assert only(all_of_it, one_mode, "recall").verdict == "A"
    assert only(all_of_it, wild, "precision").verdict == "A"
    for name in ("precision", "recall"):
        found = only(all_of_it, wild, name)
        assert found.interval[0] < found.difference < found.interval[1]
    assert "it is not resampled" in only(all_of_it, wild, "inception_score").note


def test_without_features_a_distance_has_no_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    a = featured(tmp_path / "a", rng.normal(size=(20, 3)), rng.normal(size=(20, 3)))
    (a.folder / "features/clip.npz").unlink()
    found = only(a, a, "fd_clip")
    assert found.difference == 0 and "holds no features of clip" in found.note


# --- protocols, and the command -------------------------------------------------------------------


def test_the_same_data_may_lie_elsewhere(tmp_path: Path) -> None:
    def result(name: str, captions: list[str], reference: str) -> Result:
        settings = {"reference_sha256": reference}
        fd = {"value": 1.0, "better": "lower", "count": 4, "settings": settings}
        protocol = {"captions": {"data": f"{name}/x"}, "reference": {"data": f"{name}/y"}}
        more = {"captions": captions, "metrics": {"fd_clip": fd}, "protocol": protocol}
        return scored(tmp_path / name, NOISE[:4], **more)

    own, other = [f"a cat {k}" for k in range(4)], [f"a dog {k}" for k in range(4)]
    here = result("here", own, "r")
    assert compare(here, result("there", own, "r")).measured_by == {}
    for name, captions, reference, key in (
        ("dogs", other, "r", "captions.data"),
        ("more", own, "s", "reference.data"),
    ):
        with pytest.raises(ValueError, match=f"differ in {key}"):
            compare(here, result(name, captions, reference))


def test_protocols_that_measure_differently_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = scored(tmp_path / "a", [1.0, 2.0], protocol={"resize": {"side": 64}, "name": "x"})
    b = scored(tmp_path / "b", [1.0, 3.0], protocol={"resize": {"side": 256}, "name": "y"})
    with pytest.raises(ValueError, match=r"differ in resize.side \(64 and 256\): .* --anyway"):
        compare(a, b)
    assert list(compare(a, b, anyway=True).measured_by) == ["resize.side"]
    with pytest.raises(SystemExit) as exit:
        main([str(a.folder), str(b.folder)])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    main([str(a.folder), str(b.folder), "--anyway"])
    assert "MEASURED DIFFERENTLY: resize.side" in capsys.readouterr().out


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = scored(tmp_path / "a", NOISE)
    b = scored(tmp_path / "b", NOISE + 1)
    spoil(b.folder, protocol={"captions": {"count": 80}, "cascade": {"guidance_scale": 1.0}})
    out = tmp_path / "new/f.json"
    main([str(a.folder), str(b.folder), "--out", str(out), "--resamples", "50"])
    said = capsys.readouterr().out
    assert "drawn differently: cascade.guidance_scale (3.0 and 1.0)" in said
    (line,) = [line for line in said.splitlines() if line.startswith("clip_score")]
    assert line.split()[3:] == ["+1", "[1,", "1]", "B"]
    (written,) = json.loads(out.read_text())["differences"]
    assert written["difference"] == pytest.approx(1) and written["paired"] is True
    with pytest.raises(SystemExit):
        main([str(a.folder), str(b.folder), "--resamples", "-1"])
    assert "resamples must not be negative" in capsys.readouterr().err
