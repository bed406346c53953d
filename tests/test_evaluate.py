"""`python -m unclip.evaluate`: a protocol's pictures drawn or taken, measured, written; gone on
with after a stop; and every way for the input to be wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from processes import run
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.config import parse
from unclip.data.shapes import ShapesConfig, draw_scene, render
from unclip.evaluate import main
from unclip.evaluation import coco, drawing
from unclip.evaluation.captions import list_captions, list_sha256
from unclip.evaluation.encoders import weights_sha256
from unclip.evaluation.protocol import CaptionsConfig, digest
from unclip.evaluation.references import RealPictures, picture_files, read_bits
from unclip.evaluation.run import EvaluateConfig
from unclip.pipeline import UnCLIP

# The tiny CLIP reads 20 tokens, and some captions of the shapes world have more.
pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")

COUNT = 10
WORLD = ShapesConfig(split="held_out", caption_detail="full")


def words(out: Path, *more: str) -> list[str]:
    """A small protocol of the shapes world, 16 px, few steps."""
    return [
        *("--out", str(out), "--captions.count", str(COUNT), "--reference.data", "shapes"),
        *("--reference.start", "1000", "--reference.count", "12", "--cascade.size", "16"),
        *("--cascade.decoder_steps", "2", "--cascade.prior_steps", "2", "--batch-size", "1"),
        *("--settings.r_precision_captions", "5", "--settings.kid_subset_size", "5"),
        *("--settings.precision_recall_encoder", "clip"),
        *more,
    ]


def result_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text())
    return found


def images_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "images").iterdir())}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def write_scenes(folder: Path, count: int = COUNT, side: int = 16, names: Any = None) -> Path:
    """True renders of the first held-out scenes as files."""
    folder.mkdir(parents=True)
    pictures = render([draw_scene(WORLD, k)[0] for k in range(count)], side)
    for k, picture in enumerate(pictures):
        name = f"{k}.png" if names is None else names[k]
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
    return folder


ALL = (
    *("oracle_all", "oracle_shape", "oracle_colour", "oracle_place"),
    *("clip_score", "r_precision", "fd_clip", "cmmd", "precision", "recall"),
    *("prior_frechet", "prior_frechet_floor", "fid", "kid", "inception_score"),
)


@pytest.fixture(scope="module")
def straight(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder of the tiny model, drawn in one go; treat as read-only."""
    out = tmp_path_factory.mktemp("evaluate") / "straight"
    main(words(out, "--model", str(tiny_model), "--metrics", *ALL))
    return out


# ------------------------------------------------------------------------------------------ results


def test_a_result_folder_holds_all_that_repeats_it(straight: Path, tiny_model: Path) -> None:
    result = result_of(straight)
    assert result["format"] == 1 and result["model"]["name"] == str(tiny_model)
    assert result["protocol_sha256"] == digest(result["protocol"])
    assert result["protocol"]["cascade"]["decoder_steps"] == 2
    assert result["command"][:3] == ["python", "-m", "unclip.evaluate"]
    assert "out" not in result["protocol"] and "model" not in result["protocol"]
    pipe = UnCLIP.from_pretrained(str(tiny_model))
    stages = {"clip": pipe.clip, "prior": pipe.prior, "decoder": pipe.decoder}
    stages["upsampler_64"] = pipe.upsamplers[0]
    assert result["model"]["stages"] == {n: weights_sha256(s) for n, s in stages.items() if s}
    assert {"torch", "unclip", "torch-fidelity"} <= result["versions"].keys()
    assert result["device"] == "cpu" and result["created"].endswith("+00:00")
    assert {"drawing_decoder", "measuring"} <= result["seconds"].keys()
    lines = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(COUNT))
    for k, line in enumerate(lines):
        assert line["id"] == f"shapes-held_out-{k}"
        assert line["caption"] == draw_scene(WORLD, k)[1].text
        with Image.open(straight / line["file"]) as picture:
            assert (picture.format, picture.size, picture.mode) == ("PNG", (16, 16), "RGB")
        scores = line["scores"]
        assert isinstance(scores["clip_score"], float) and isinstance(scores["r_precision"], bool)
        assert scores["oracle_all"] in (True, False)
    arrays = np.load(straight / "features/clip.npz")
    assert arrays["features"].shape == (COUNT, 16) and arrays["reference"].shape == (12, 16)
    assert arrays["features"].dtype == np.float32


def test_each_metric_has_a_value_or_a_reason(straight: Path) -> None:
    metrics = result_of(straight)["metrics"]
    assert list(metrics) == list(ALL)
    for name in ("fid", "kid", "inception_score"):
        assert metrics[name]["value"] is None
        assert "inception.weights: weights-inception" in metrics[name]["reason"]
        assert "python -c" in metrics[name]["reason"]
    for name in set(ALL) - {"fid", "kid", "inception_score"}:
        assert isinstance(metrics[name]["value"], float) and "reason" not in metrics[name]
        assert metrics[name]["count"] <= COUNT and metrics[name]["better"] in (
            *("lower", "higher"),
            None,
        )
    assert metrics["fd_clip"]["settings"]["reference_count"] == 12
    assert len(metrics["fd_clip"]["settings"]["reference_sha256"]) == 64
    assert metrics["fd_clip"]["weights"] == {
        f"{result_of(straight)['model']['name']}'s CLIP": result_of(straight)["model"]["stages"][
            "clip"
        ]
    }
    for name in ("clip_score", "r_precision", "oracle_all"):
        low, high = metrics[name]["interval"]
        assert low <= metrics[name]["value"] <= high
    tables = result_of(straight)["tables"]
    assert tables["oracle"]["all"]["all"]["fraction"] == metrics["oracle_all"]["value"]
    assert tables["prior"]["frechet_sampled_to_real"] == metrics["prior_frechet"]["value"]


def test_a_stopped_command_goes_on_to_the_same_pictures(
    straight: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "out", drawing.save

    def stop_after_three(picture: Image.Image, path: Path) -> None:
        if len(list((out / "images").glob("*.png"))) == 3:
            path.with_name(f".{path.name}.part").write_bytes(b"half")  # what a kill leaves
            raise KeyboardInterrupt
        save(picture, path)

    command = words(out, "--model", str(tiny_model), "--metrics", *ALL)
    monkeypatch.setattr(drawing, "save", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    monkeypatch.setattr(drawing, "save", save)
    assert not (out / "result.json").exists() and len(images_of(out)) == 4
    kept = (out / "images/000001.png").stat().st_mtime_ns
    main(command)
    assert images_of(out) == images_of(straight)
    assert (out / "images/000001.png").stat().st_mtime_ns == kept
    assert result_of(out)["metrics"] == result_of(straight)["metrics"]


def test_other_settings_than_an_unfinished_folders_are_refused(
    straight: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(straight, tmp_path / "out"))
    (out / "result.json").unlink()
    command = words(out, "--model", str(tiny_model), "--metrics", "clip_score")
    said = refused(capsys, *command, "--guidance-scale", "2.0")
    assert "out must hold pictures drawn with these settings" in said
    assert "where cascade.guidance_scale is 3.0 and not 2.0" in said
    assert "where seed is 0 and not 7" in refused(capsys, *command, "--seed", "7")
    assert "where captions_sha256 is" in refused(capsys, *command, "--num", "5")
    assert "where stages.clip is" in refused(capsys, *command, "--model", "shapes")
    # What is measured may change: pictures are not drawn again.
    before = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    main(command)
    assert {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()} == before
    assert list(result_of(out)["metrics"]) == ["clip_score"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    said = refused(capsys, *words(tmp_path / "mine", "--model", str(tiny_model)))
    assert "out must be a new folder, or one that this command wrote" in said


def test_two_processes_draw_a_share_each(straight: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = words(out, "--model", str(tiny_model), "--metrics", "clip_score", "fd_clip")
    run(2, main, [command], tmp_path / "logs", OMP_NUM_THREADS="1")
    assert images_of(out).keys() == images_of(straight).keys()
    for name in images_of(out):  # another process may round otherwise in the last bit
        ours, theirs = (read_bits(folder / "images" / name) for folder in (out, straight))
        assert (ours.int() - theirs.int()).abs().max() <= 1
    for name, metric in result_of(out)["metrics"].items():
        expected = result_of(straight)["metrics"][name]["value"]
        assert metric["value"] == pytest.approx(expected, rel=1e-2)


# ------------------------------------------------------------------------------- pictures elsewhere


def test_pictures_from_elsewhere_need_no_model(tmp_path: Path) -> None:
    metrics = ["--metrics", "oracle_all", "clip_score", "prior_frechet"]
    size = ["--resize.side", "64"]
    by_order = write_scenes(tmp_path / "order", side=64)
    main(words(tmp_path / "a", "--pictures", str(by_order), *size, *metrics))
    result = result_of(tmp_path / "a")
    # True renders in the order of 0, 1, ..., 9: the oracle finds them all.
    assert result["metrics"]["oracle_all"]["value"] == 1
    assert result["model"] == {"name": "pictures of order", "stages": {}, "matched_by": "order"}
    assert "--clip.name" in result["metrics"]["clip_score"]["reason"]
    assert "--model" in result["metrics"]["prior_frechet"]["reason"]
    names = [f"shapes-held_out-{k}.png" for k in range(COUNT)]
    by_id = write_scenes(tmp_path / "ids", side=64, names=names)
    main(words(tmp_path / "b", "--pictures", str(by_id), *size, "--metrics", "oracle_all"))
    assert result_of(tmp_path / "b")["model"]["matched_by"] == "ids"
    assert images_of(tmp_path / "b") == images_of(tmp_path / "a")


def test_numbers_in_names_are_numbers(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "order", 12)
    assert [path.stem for path in picture_files(folder)] == [str(k) for k in range(12)]


def test_a_count_mismatch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_scenes(tmp_path / "few", COUNT - 1)
    said = refused(capsys, *words(tmp_path / "out", "--pictures", str(folder)))
    assert f"pictures must hold one for each caption, {COUNT}; got {COUNT - 1} in {folder}" in said
    (folder / "x.png").write_bytes(b"no picture")
    said = refused(capsys, *words(tmp_path / "out", "--pictures", str(folder)))
    assert "x.png cannot be read" in said
    shutil.copy(folder / "0.png", folder / "x.png")  # mended: the same command goes on
    main(words(tmp_path / "out", "--pictures", str(folder), "--metrics", "oracle_all"))
    assert (tmp_path / "out/result.json").is_file()
    said = refused(capsys, *words(tmp_path / "new", "--pictures", str(tmp_path / "none")))
    assert "pictures must be a folder" in said


def test_one_picture_repeated_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_scenes(tmp_path / "same")
    for k in range(1, COUNT):
        shutil.copy(folder / "0.png", folder / f"{k}.png")
    command = words(tmp_path / "out", "--pictures", str(folder), "--metrics", "oracle_all")
    assert "pictures must differ, all but max_repeated 0.1 of them; got 9 of 10" in refused(
        capsys, *command
    )
    main([*command, "--max-repeated", "1"])
    assert result_of(tmp_path / "out")["metrics"]["oracle_all"]["count"] == COUNT


def test_a_reference_of_another_size_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = write_scenes(tmp_path / "drawn")
    other = write_scenes(tmp_path / "other", side=24)
    command = words(tmp_path / "out", "--pictures", str(drawn), "--clip.name", str(tiny_model))
    command += ["--reference.data", str(other), "--reference.start", "0"]
    command += ["--reference.count", "10", "--metrics", "fd_clip"]
    said = refused(capsys, *command)
    assert "reference must hold pictures of 16 x 16 px, as the first drawn one; got 24 x 24" in said
    assert "set resize.side" in said
    main([*command, "--resize.side", "16"])
    result = result_of(tmp_path / "out")
    assert result["metrics"]["fd_clip"]["settings"]["resize_to"] == 16
    said = refused(capsys, *command, "--reference.count", "11")
    assert "reference.count must not exceed the pictures" in said and "10; got 11" in said
    found = result["metrics"]["fd_clip"]["settings"]["reference_sha256"]
    main([*command, "--resize.side", "16", "--reference.sha256", found[:8]])
    said = refused(capsys, *command, "--resize.side", "16", "--reference.sha256", "beef")
    assert "reference.sha256 must be that of the set; got beef" in said and found in said
    # The pictures that were taken must be those that are there.
    shutil.copy(drawn / "1.png", drawn / "0.png")
    said = refused(capsys, *command, "--resize.side", "16")
    assert "where pictures_state is" in said


def test_pictures_that_are_not_finite_are_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = model / "decoder/model.safetensors"
    spoilt = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    name = next(name for name in spoilt if name.endswith("weight"))
    spoilt[name].fill_(float("nan"))
    save_file(spoilt, weights)
    said = refused(capsys, *words(tmp_path / "out", "--model", str(model)))
    assert "pictures must be finite; got NaN or infinity for" in said
    assert "(id shapes-held_out-0, seed 0): draw with --dtype float32" in said
    assert not (tmp_path / "out/images").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--metrics", "kid", "--settings.kid_subset_size", "11"), "kid_subset_size must not ex"),
        (("--metrics", "inception_score", "--settings.inception_splits", "11"), "inception_splits"),
        (("--metrics", "recall", "--settings.neighbours", "10"), "neighbours must not exceed 9"),
        (("--metrics", "r_precision", "--settings.r_precision_captions", "11"), "10 distinct capt"),
        (("--metrics", "kid", "--reference.count", "4"), "for kid of 4 reference pictures"),
        (("--reference.data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--num", "11"), "num must not exceed the captions, 10; got 11"),
        (("--metrics", "fid", "--num", "1"), "num must give at least 2 pictures for fid; got 1"),
        (("--metrics", "prior_frechet", "--num", "7"), "num must be at least 8 for prior_frechet"),
        (("--metrics", "fids"), "metrics must be names that are known; got 'fids': did you mean"),
        (("--metrics", "lpips_diversity"), "samples_per_caption must be at least 2 for lpips"),
        (("--captions.data", "x.jsonl", "--metrics", "oracle_all"), "must leave out oracle_all"),
        (("--captions.count", "0"), "captions.count must be at least 1; got 0"),
        (("--reference.count", "null"), "reference.count must say how many"),
        (("--max-repeated", "2"), "max_repeated must lie in [0, 1]; got 2"),
        (("--batch-size", "0"), "batch_size must be at least 1; got 0"),
        (("--settings.cmmd_sigma", "0"), "settings.cmmd_sigma must be above 0; got 0"),
        (("--dinov2.side", "225"), "dinov2.side must be a multiple of 14; got 225"),
    ],
)
def test_too_little_and_out_of_range_is_refused_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, *words(tmp_path / "out", "--model", "shapes", *more))
    assert not (tmp_path / "out").exists()


def test_what_was_refused_before_the_first_picture_can_be_mended(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"id": "a", "caption": "a red circle"}\n{"id": "b", "caption": " "}\n')
    command = words(tmp_path / "out", "--model", str(tiny_model), "--captions.data", str(listed))
    command += ["--metrics", "clip_score"]
    assert "the caption of b must not be empty" in refused(capsys, *command)
    listed.write_text('{"id": "a", "caption": "a red circle"}\n')
    assert "size must be" in refused(capsys, *command, "--cascade.size", "17")
    main(command)
    assert result_of(tmp_path / "out")["metrics"]["clip_score"]["count"] == 1


def test_a_model_or_pictures_must_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "model must be named, or pictures" in refused(capsys, *words(tmp_path / "out"))


# ------------------------------------------------------------------------------------ more metrics


def pooled() -> nn.Module:
    """A feature network, as a user would name it: `test_evaluate:pooled`."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten())


def test_faces_are_held_against_the_captions_own_pictures(tmp_path: Path) -> None:
    drawn = write_scenes(tmp_path / "drawn")
    face = ["--face.weights", f"{__name__}:pooled", "--face.side", "16"]
    metrics = ["--metrics", "fsd", "fss", "fd_face"]
    command = words(tmp_path / "out", "--pictures", str(drawn), *face, *metrics)
    main([*command, "--resize.side", "16"])
    found = result_of(tmp_path / "out")["metrics"]
    # The very pictures that the captions were written for.
    assert found["fsd"]["value"] == 0 and found["fss"]["value"] == pytest.approx(1)
    assert found["fd_face"]["value"] > 1
    line = json.loads((tmp_path / "out/samples.jsonl").read_text().splitlines()[0])
    assert line["scores"]["fss"] == pytest.approx(1)


def test_weights_of_another_hash_give_no_number(tiny_model: Path, tmp_path: Path) -> None:
    drawn = write_scenes(tmp_path / "drawn")
    own = weights_sha256(UnCLIP.from_pretrained(str(tiny_model)).clip)  # type: ignore[arg-type]
    command = words(tmp_path / "out", "--pictures", str(drawn), "--clip.name", str(tiny_model))
    command += ["--metrics", "clip_score", "fd_clip"]
    main([*command, "--clip.sha256", own])
    assert result_of(tmp_path / "out")["metrics"]["clip_score"]["value"] is not None
    main([*command, "--clip.sha256", "0123abcd"])
    for metric in result_of(tmp_path / "out")["metrics"].values():
        assert metric["value"] is None
        assert "0123abcd" in metric["reason"] and own in metric["reason"]


def test_diversity_is_measured_among_samples_of_a_caption(tiny_model: Path, tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    alexnet = tmp_path / "alexnet.pth"
    trunk = torchvision.models.alexnet(weights=None).features.state_dict(prefix="features.")
    torch.save(trunk, alexnet)
    command = words(tmp_path / "out", "--model", str(tiny_model), "--num", "2")
    command += ["--samples-per-caption", "2", "--cascade.size", "64"]
    command += ["--cascade.upsampler_steps", "1"]
    command += ["--metrics", "lpips_diversity", "--lpips.weights", str(alexnet)]
    main(command)
    found = result_of(tmp_path / "out")["metrics"]["lpips_diversity"]
    assert found["value"] > 0 and found["count"] == 2
    assert found["settings"]["samples_per_caption"] == 2 and "alexnet.pth" in found["weights"]
    lines = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [line["id"][-1] for line in lines] == ["0", "0", "1", "1"]
    assert [line["seed"] for line in lines] == [0, 1, 2, 3]


def test_a_prior_without_other_pictures_has_no_floor(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    command = words(tmp_path / "out", "--model", str(tiny_model), "--resize.side", "16")
    for section in ("captions", "reference"):
        command += [f"--{section}.data", str(pictures), f"--{section}.count", "null"]
    command += ["--reference.start", "0", "--max-repeated", "1"]
    command += ["--metrics", "prior_frechet", "prior_frechet_floor"]
    main(command)
    result = result_of(tmp_path / "out")
    assert result["metrics"]["prior_frechet"]["value"] > 0
    assert "--reference.floor" in result["metrics"]["prior_frechet_floor"]["reason"]
    assert "frechet_real_to_real" not in result["tables"]["prior"]
    main([*command, "--reference.floor", "shapes"])
    assert result_of(tmp_path / "out")["metrics"]["prior_frechet_floor"]["value"] > 0


# ------------------------------------------------------------------------------------- captions


def test_captions_are_chosen_and_ordered_by_a_file_of_ids(pictures: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("7.png\n\n2.png\n")
    items = list_captions(CaptionsConfig(data=str(pictures), ids=ids))
    assert [(item.id, item.caption) for item in items] == [
        ("7.png", "picture 7"),
        ("2.png", "picture 2"),
    ]
    digest = list_sha256(items)
    assert list_captions(CaptionsConfig(data=str(pictures), ids=ids, sha256=digest[:12])) == items
    with pytest.raises(ValueError, match=f"got abc for .* have {digest}"):
        list_captions(CaptionsConfig(data=str(pictures), ids=ids, sha256="abc"))
    ids.write_text("7.png\n77.png\n")
    with pytest.raises(ValueError, match=r"captions.ids must be ids of .*; got '77.png'"):
        list_captions(CaptionsConfig(data=str(pictures), ids=ids))
    ids.write_text("7.png\n7.png\n")
    with pytest.raises(ValueError, match=r"captions.ids must name ids, each once; got '7.png'"):
        list_captions(CaptionsConfig(data=str(pictures), ids=ids))


def test_a_list_of_captions_is_read_whole_or_not(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"id": 1, "caption": " a cat "}\n\n{"id": "b", "caption": "a dog"}\n')
    items = list_captions(CaptionsConfig(data=str(path)))
    assert [(item.id, item.caption) for item in items] == [("1", "a cat"), ("b", "a dog")]
    path.write_text('{"id": 1, "caption": "a cat"}\n{"id": 1, "caption": "a dog"}\n')
    with pytest.raises(ValueError, match="must have an id a picture; got '1' twice"):
        list_captions(CaptionsConfig(data=str(path)))
    path.write_text('{"id": 1, "caption": "a cat"}\n{"caption": "a dog"}\n')
    with pytest.raises(ValueError, match="an id and a caption a line; line 2 has not"):
        list_captions(CaptionsConfig(data=str(path)))


def annotations(count: int) -> dict[str, Any]:
    images = [{"id": 7 * k, "file_name": f"COCO_val2014_{k:03d}.jpg"} for k in range(count)]
    told = [
        {"id": 100 * k + n, "image_id": 7 * k, "caption": f"thing {k}\n  told {n}"}
        for k in range(count)
        for n in range(5)
    ]
    return {"images": images, "annotations": told}


def test_cocos_list_is_fixed_by_its_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = annotations(20)
    items = coco.choose(whole, 12, seed=3)
    assert len({item.id for item in items}) == 12
    assert [item.id for item in items] == sorted(item.id for item in items)
    shuffled = {name: rows[::-1] for name, rows in whole.items()}
    assert coco.choose(shuffled, 12, seed=3) == items
    assert coco.choose(whole, 12, seed=4) != items
    assert len({item.caption[-1] for item in items}) > 1  # not each picture's first
    for item in items:
        assert item.caption.startswith(f"thing {int(item.id[-3:])} told ")
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(whole))
    coco.main([str(path), "--count", "12", "--seed", "3", "--out", str(tmp_path / "list.jsonl")])
    assert list_sha256(items) in capsys.readouterr().out
    assert list_captions(CaptionsConfig(data=str(tmp_path / "list.jsonl"))) == items
    with pytest.raises(ValueError, match="count must lie between 1 and the pictures"):
        coco.choose(whole, 21)
    with pytest.raises(ValueError, match=r"annotations must be COCO's captions_val2014.json"):
        coco.choose({"images": []})


def test_both_of_cocos_conventions(tiny_model: Path, tmp_path: Path) -> None:
    """20 real pictures, of which 12 are drawn for: all of them, or the same 12."""
    names = [f"COCO_val2014_{k:03d}.jpg" for k in range(20)]
    real = write_scenes(tmp_path / "val2014", 20, 24, names)
    drawn = write_scenes(tmp_path / "drawn", 12, 16)
    listed = tmp_path / "list.jsonl"
    items = coco.choose(annotations(20), 12)
    listed.write_text("".join(json.dumps({"id": i.id, "caption": i.caption}) + "\n" for i in items))
    counts = {}
    for which in ("all", "captions"):
        out = tmp_path / which
        main(
            [
                *("--config", str(ROOT / "configs/evaluation/coco30k.yaml"), "--out", str(out)),
                *("--pictures", str(drawn), "--captions.data", str(listed)),
                *("--reference.data", str(real), "--reference.which", which),
                *("--clip.name", str(tiny_model), "--resize.side", "16"),
                *("--metrics", "fd_clip", "cmmd"),
            ]
        )
        found = result_of(out)["metrics"]
        counts[which] = found["fd_clip"]["settings"]["reference_count"]
        assert found["cmmd"]["value"] is not None
    assert counts == {"all": 20, "captions": 12}
    missing = RealPictures(str(real), CaptionsConfig(count=1), 16)
    with pytest.raises(ValueError, match=r"reference.data must hold a picture of each caption's"):
        missing.read("COCO_val2014_999")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/evaluation").glob("*.yaml")), ids=str)
def test_every_protocol_is_read(path: Path) -> None:
    config = parse(EvaluateConfig, ["--config", str(path), "--model", "shapes"])
    assert config.metrics and config.name
