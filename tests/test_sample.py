"""sample.py: what it writes, what a PNG remembers, and how it says that the input is at fault."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, PngImagePlugin

import sample
from unclip import pictures
from unclip.hub import names
from unclip.pipeline import CascadeOptions

FAST = ["--prior-steps", "2", "--steps", "2", "--upsampler-steps", "2", "--device", "cpu"]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs the script in this process on the tiny model; returns its exit code."""

    def run(*words: str, model: bool = True, first: bool = False) -> int:
        where = ["--out", str(tmp_path / "out"), *(["--model", str(tiny_model)] if model else [])]
        try:
            return sample.main([*words] if first else [*where, *words])
        except SystemExit as error:  # argparse's way out
            return int(error.code or 0)

    return run


def outputs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_alone_it_draws_four_captions_with_the_shipped_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "pretrained" / "shapes")
    # A copy of the checkout's script beside no model: the real one may or may not be there yet.
    monkeypatch.setattr(names, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--guidance", "3.0"]) == 0
    files = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert files == [
        "0000-a-red-circle-left-of-a-blue-square.png",
        "0000-grid.png",
        "0001-a-yellow-star-in-the-top-right-corner.png",
        "0002-a-big-green-triangle-in-the-middle.png",
        "0003-a-purple-heart-above-an-orange-cross.png",
    ]


def test_pictures_grid_and_report(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a red circle", "--prompt", "a blue star", "--num-images", "2", *FAST]
    assert run(*words) == 0
    captured = capsys.readouterr()
    assert outputs(tmp_path) == [
        "0000-a-red-circle.png",
        "0000-grid.png",
        "0001-a-red-circle.png",
        "0002-a-blue-star.png",
        "0003-a-blue-star.png",
    ]
    for name in outputs(tmp_path):
        assert name in captured.out
    assert re.search(r"4 pictures in .* s: text .* s, prior .* s, decoder .* s, ups", captured.out)
    assert "decoder" in captured.err  # the progress bars
    grid = Image.open(tmp_path / "out" / "0000-grid.png")
    assert grid.width == 2 * (128 + 12) + 12  # two columns, wide enough for captions
    # A second run numbers on.
    assert run(*words) == 0
    assert len(outputs(tmp_path)) == 10
    assert "0004-a-red-circle.png" in outputs(tmp_path)


def test_a_png_says_what_made_it_and_is_repeated_exactly(
    run, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "a réd circle", "--num-images", "9", "--seed", "7", "--guidance", "2"]
    assert run(*words, *FAST) == 0  # 9 pictures: the last one is alone in its batch
    for k in (3, 8):
        original = tmp_path / "out" / f"{k:04d}-a-réd-circle.png"
        with Image.open(original) as picture:
            made_by = json.loads(picture.info["unclip"])
            assert picture.info["Description"] == "a réd circle"
        assert made_by["prompt"] == "a réd circle"
        assert made_by["seed"] == 7 + k
        assert made_by["model"] == str(tiny_model)
        assert made_by["options"]["guidance_scale"] == 2.0
        assert made_by["options"]["decoder_steps"] == 2
        capsys.readouterr()
        assert run("--from-png", str(original), model=False) == 0
        printed = capsys.readouterr().out
        assert f"identical to {original}" in printed
        again = Path(printed.split("\n")[1])
        assert again != original
        with Image.open(original) as one, Image.open(again) as other:
            assert one.tobytes() == other.tobytes()
            assert json.loads(other.info["unclip"]) == made_by


def test_prompts_from_a_file(run, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue star \n")
    assert run("--prompts-file", str(file), "--size", "16", *FAST) == 0
    assert "0001-a-blue-star.png" in outputs(tmp_path)
    assert Image.open(tmp_path / "out" / "0001-a-blue-star.png").size == (16, 16)


def test_a_cut_prompt_is_warned_of_in_one_line(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", " ".join(["circle"] * 20) + " tail", "--size", "16", *FAST) == 0
    lines = [line for line in capsys.readouterr().err.split("\n") if "warning" in line]
    assert len(lines) == 1
    assert re.search(r"warning: the caption has more than 20 tokens; cut off: .*tail", lines[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "prompt must not be empty"),
        (["--guidance", "-1"], "guidance_scale must not be negative; got -1.0"),
        (["--sampler", "dimm"], "sampler must be one of .*did you mean 'ddim'"),
        (["--steps", "0"], "decoder_steps must be at least 1; got 0"),
        (["--num-images", "0"], "num_images must be at least 1; got 0"),
        (["--size", "100"], "size must be one of 16, 64"),
        (["--model", "nowhere"], "there is no model 'nowhere'"),
        (["--prior", "nowhere"], "there is no model 'nowhere'"),
        (["--prompts-file", "nowhere.txt"], "--prompts-file nowhere.txt cannot be read"),
        (["--from-png", "nowhere.png"], "--from-png nowhere.png cannot be read"),
        (["--from-png", "x.png", "--guidance", "2"], "leave out --guidance"),
        (["--from-png", "x.png", "--num-images", "2"], "leave out --num-images"),
        (["--prompt", "a", "--prompts-file", "x"], "exclude each other"),
        (["--device", "abacus"], "--device 'abacus' is none of torch's"),
        (["--dtype", "int8"], "invalid choice"),
        (["--gidance", "2"], "unrecognized arguments: --gidance"),
        (["--seed", "one"], "invalid int value"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_out_that_cannot_be_written_is_noticed_first(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "load", lambda *_: pytest.fail("it loaded the model first"))
    (tmp_path / "out").write_text("a file in the way")  # root may write anywhere else
    assert run() == 2
    assert re.match(r"error: cannot write into --out .*choose another", capsys.readouterr().err)


def test_a_png_of_another_origin(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert run("--from-png", str(tmp_path / "x.png")) == 2
    assert "must be a picture that sample.py wrote" in capsys.readouterr().err


def test_a_png_with_forged_settings(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--prompt", "a circle", "--size", "16", *FAST) == 0
    with Image.open(tmp_path / "out" / "0000-a-circle.png") as picture:
        made_by = json.loads(picture.info["unclip"])
        info = PngImagePlugin.PngInfo()
        info.add_text("unclip", json.dumps({**made_by, "dtype": "load"}))
        picture.save(tmp_path / "forged.png", pnginfo=info)
    capsys.readouterr()
    assert run("--from-png", str(tmp_path / "forged.png"), model=False) == 2
    assert "settings that sample.py never wrote" in capsys.readouterr().err


def test_help_repeats_the_defaults_of_the_cascade() -> None:
    defaults = {field.name: field.default for field in fields(CascadeOptions)}
    assert {name for _, name, _, _ in sample.OPTIONS} == set(defaults)
    for _, name, _, text in sample.OPTIONS:
        if defaults[name] is not None:
            assert f"(default: {defaults[name]})" in text


def test_help_and_bad_flags_do_not_wait_for_torch() -> None:
    code = "import sys, sample; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_captions_are_wrapped_to_their_picture() -> None:
    picture = Image.new("RGB", (256, 256))
    font = pictures.ImageFont.load_default(size=14)
    lines = pictures.wrap("a big striped red circle to the left of a tiny blue square", font, 256)
    assert len(lines) > 1 and all(font.getlength(line) <= 256 for line in lines)
    short = pictures.grid([picture], ["a"], 1)
    tall = pictures.grid([picture], ["a word " * 30], 1)
    assert tall.height > short.height


# -------------------------------------------------------------------- what is done to pictures


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    noise = Image.effect_noise((40, 30), 90)
    Image.merge("RGBA", [noise, noise, noise, noise]).save(path)
    return path


@pytest.fixture
def edit(run, tiny_model: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs a sub-command, whose name comes first."""

    def edit(*words: str) -> int:
        where = ["--model", str(tiny_model), "--out", str(tmp_path / "out")]
        return run(words[0], *words[1:], *where, *FAST, first=True)

    return edit


def test_the_commands_are_those_there_are() -> None:
    from unclip.edits import commands

    assert sample.VERBS.keys() == commands.INPUTS_OF.keys()


def test_variations_of_a_file(
    edit, run, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit("variations", str(picture), "--num-images", "2", "--eta", "0.5", "--seed", "3") == 0
    assert outputs(tmp_path) == [
        "0000-variations-cat-grid.png",
        "0000-variations-cat.png",
        "0001-variations-cat.png",
    ]
    printed = capsys.readouterr().out
    assert f"note: {picture} is 40 x 30 px: its middle square is resized to 16 px" in printed
    with Image.open(tmp_path / "out" / "0001-variations-cat.png") as drawn:
        made_by = json.loads(drawn.info["unclip"])
    assert (made_by["verb"], made_by["seed"]) == ("variations", 4)
    assert made_by["options"]["eta"] == 0.5
    assert made_by["inputs"]["image"]["file"] == "cat.png"
    assert len(made_by["inputs"]["image"]["sha256"]) == 64
    assert run("--from-png", str(tmp_path / "out" / "0001-variations-cat.png"), model=False) == 2
    assert "python sample.py variations" in capsys.readouterr().err


def test_a_latent_is_written_and_drawn_again(
    edit, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit("invert", str(picture)) == 0
    psnr = re.search(r"drawn again in 2 steps: ([\d.]+) dB at 16 px", capsys.readouterr().out)
    assert psnr
    out = tmp_path / "out"
    with Image.open(out / "0000-invert-cat.png") as drawn:
        made_by = json.loads(drawn.info["unclip"])
    assert f"{made_by['psnr']:.2f}" == psnr[1]
    assert edit("decode", str(out / "0000-invert-cat-latent.safetensors")) == 0
    again = out / "0001-decode-0000-invert-cat-latent.png"
    with Image.open(out / "0000-invert-cat.png") as one, Image.open(again) as other:
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("kind", ["gif", "webp", "apng"])
def test_a_way_between_two_is_a_strip_and_an_animation(
    edit, picture: Path, tmp_path: Path, kind: str
) -> None:
    words = ["interpolate", str(picture), "a red circle", "--frames", "3", "--animation", kind]
    assert edit(*words) == 0
    out = tmp_path / "out"
    assert Image.open(out / "0000-interpolate-cat-strip.png").size == (3 * 64, 64)
    name = f"0000-interpolate-cat-{sample.EXTENSIONS[kind]}"
    assert Image.open(out / name).n_frames == 4  # there and back
    assert len(outputs(tmp_path)) == 5


PCA = ["--data", "shapes", "--num-samples", "20"]


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["interpolate", "CAT", "a red circle", "--at", "0.3"], 1),
        (["interpolate", "CAT", "CAT", "--fixed-noise", "--frames", "2"], 4),
        (["text-diff", "CAT", "--from", "a cat", "--to", "a dog", "--frames", "2"], 4),
        (["pca", "CAT", *PCA, "--num-components", "2"], 1),
        (["pca", "CAT", *PCA, "--num-components", "2", "4", "--num-images", "2"], 5),
        (["inpaint", "CAT", "--mask", "MASK", "--num-resamples", "2", "--jump-length", "1"], 1),
        (["inpaint", "CAT", "--mask", "MASK", "--prompt", "a cat", "--num-images", "2"], 3),
        (["upscale", "CAT"], 1),
        (["decode", "EMBEDS"], 3),
    ],
)
def test_every_command_draws(
    edit, picture: Path, tmp_path: Path, words: list[str], count: int
) -> None:
    mask = Image.new("L", (40, 30))
    mask.paste(255, (0, 0, 20, 30))
    mask.save(tmp_path / "mask.png")
    np.save(tmp_path / "embeds.npy", np.random.default_rng(0).normal(size=(2, 16)))
    files = {"CAT": picture, "MASK": tmp_path / "mask.png", "EMBEDS": tmp_path / "embeds.npy"}
    assert edit(*(str(files.get(word, word)) for word in words)) == 0
    assert len(outputs(tmp_path)) == count


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["variatons", "CAT"], "no such command 'variatons'.*did you mean 'variations'"),
        (["variations", "nowhere.png"], "nowhere.png cannot be read: No such file"),
        (["variations", "TEXT"], "no known image format"),
        (["variations", "CAT", "--eta", "0"], r"eta must lie in \(0, 1\] for variations; got 0"),
        (["variations", "CAT", "--eta", "1.5"], r"eta must lie in \[0, 1\]"),
        (["interpolate", "nowhere.png", "a cat"], "nowhere.png cannot be read: there is no"),
        (["interpolate", "CAT", "a cat", "--frames", "1"], "--frames must be at least 2"),
        (["interpolate", "CAT", "a cat", "--at", "2"], r"at must lie in \[0, 1\]"),
        (["text-diff", "CAT", "--from", "a", "--to", "b", "--theta", "2"], "theta must lie in"),
        (["text-diff", "CAT", "--from", "a", "--to", "a"], "the two texts must differ"),
        (["text-diff", "CAT", "--to", "b"], "required: --from"),
        (["pca", "CAT"], "has no PCA with it; got no --data"),
        (["pca", "CAT", "--data", "nowhere"], "nowhere"),
        (["inpaint", "CAT", "--mask", "TEXT"], "no known image format"),
        (["inpaint", "CAT", "--mask", "CAT", "--num-resamples", "0"], "num_resamples must be at"),
        (["inpaint", "CAT", "--mask", "BLACK"], "all black"),
        (["inpaint", "CAT", "--mask", "WHITE"], "all white"),
        (["inpaint", "CAT", "--mask", "OTHER"], "as large as the picture, 40 x 30 px; got 8 x 8"),
        (["decode", "TEXT"], "cannot be read as an .npy of numbers"),
        (["decode", "WIDE"], r"must be \[16\] or \[N, 16\].*got \[2, 8\]"),
        (["decode", "NAN"], "must be finite; got NaN or infinity in row 0"),
        (["upscale", "CAT", "--prompt", ""], "prompt must not be empty"),
    ],
)
def test_bad_edits_are_one_line_and_code_2(
    edit,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    files = {"CAT": picture, "TEXT": tmp_path / "text.png"}
    files["TEXT"].write_text("no picture")
    for name, colour, size in (
        ("BLACK", 0, (40, 30)),
        ("WHITE", 255, (40, 30)),
        ("OTHER", 0, (8, 8)),
    ):
        files[name] = tmp_path / f"{name}.png"
        Image.new("L", size, colour).save(files[name])
    for name, rows in (("WIDE", np.ones((2, 8))), ("NAN", np.full((1, 16), np.nan))):
        files[name] = tmp_path / f"{name}.npy"
        np.save(files[name], rows)
    assert edit(*(str(files.get(word, word)) for word in words)) == 2
    err = capsys.readouterr().err
    line = err.strip().split("\n")[-1]
    assert line.startswith("error: ") and re.search(message, line)
    assert not (tmp_path / "out").exists() or not outputs(tmp_path)


def test_an_interrupted_edit_leaves_nothing(
    edit, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unclip.stages import UpsamplerStage

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UpsamplerStage, "sample", interrupt)
    assert edit("variations", str(picture)) == 130
    assert outputs(tmp_path) == []
