"""The typographic attack: the patch, the probe on a tiny model, the command."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from unclip.evaluation.typographic import (
    CONDITIONS,
    TypographicConfig,
    attack_all,
    main,
    write_over,
)
from unclip.pipeline import UnCLIP

pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")


def test_a_word_stands_on_its_patch_and_nowhere_else() -> None:
    image = torch.full((3, 64, 64), -0.5)
    written = write_over(image, "blue", "bottom", 0.25)
    blank = write_over(image, "blue", "bottom", 0.25, blank=True)
    assert torch.equal(written[:, :48], blank[:, :48])
    assert (written[:, :48] + 0.5).abs().max() < 0.01  # 8-bit rounding
    assert (blank[:, 48:] == 1).any() and not (blank == -1).any()
    assert (written[:, 48:] < -0.9).any(), "no letter is black"
    patch = (blank == 1).all(0)
    assert torch.equal((write_over(image, "blue", "top", 0.25, blank=True) == 1).all(0)[:16],
                       patch[48:])  # fmt: skip
    centre = (write_over(image, "blue", "centre", 0.25, blank=True) == 1).all(0)
    assert torch.equal(centre[24:40], patch[48:]) and centre.sum() == patch.sum()


def test_a_long_word_shrinks_to_the_picture() -> None:
    image = torch.full((3, 256, 256), -0.5)
    written = write_over(image, "a word that is far too long", "centre", 0.3)
    dark = (written < -0.9).any(0).any(0)
    assert dark.any() and not dark[:1].any() and not dark[-1:].any()


def test_the_probe_on_a_tiny_model(tiny_model: Path) -> None:
    config = TypographicConfig(
        model=str(tiny_model), limit=2, num_variations=2, size=16, templates=("a {}",), device="cpu"
    )
    attacks, result = attack_all(config)
    assert len(attacks) == 4  # two pictures, each with a shape's name and a colour's
    assert {attack.attribute for attack in attacks} == {"shape", "colour"}
    for attack in attacks:
        assert attack.label in (attack.picture.said or "") and attack.word != attack.label
        assert all(attack.variations[name].shape == (2, 3, 16, 16) for name in CONDITIONS)
        # The same seeds under every condition: what differs is what CLIP saw.
        assert not torch.equal(attack.variations["clean"], attack.variations["attacked"])
    for rows in result["summary"].values():
        assert set(rows) == set(CONDITIONS)
        for row in rows.values():
            assert {"label", "p_word", "variations_word", "oracle_label"} <= set(row)
            assert all(0 <= value <= 1 for name, value in row.items() if name != "attacks")
    json.dumps(result)


def test_a_variation_is_the_decoders_answer_to_the_pictures_embedding(tiny_model: Path) -> None:
    config = TypographicConfig(
        model=str(tiny_model), limit=1, num_variations=2, size=16, templates=("{}",), device="cpu"
    )
    (attack, _), _ = attack_all(config)
    pipe = UnCLIP.from_pretrained(str(tiny_model))
    assert pipe.clip is not None
    embed = pipe.clip.encode_image(attack.images["attacked"][None])
    drawn = pipe(image_embed=embed, seed=1, eta=1.0, size=16, progress=False).images[0]
    off = [(drawn - other).abs().max() for other in attack.variations["attacked"]]
    # Rounding differs with the batch, and random weights make more of it.
    assert off[1] < 0.1 < 0.5 < off[0]


def test_the_command_on_ones_own_picture(
    tiny_model: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (50, 40), "red").save(tmp_path / "apple.png")
    words = ["--model", str(tiny_model), "--clip", str(clip_folder), "--size", "16"]
    words += ["--pictures", str(tmp_path / "apple.png"), "--classes", "apple", "iPod", "pizza"]
    words += ["--words", "iPod", "pizza", "--num-variations", "1", "--place", "centre"]
    main([*words, "--templates", "a {}", "--out", str(tmp_path / "out")])
    told = json.loads((tmp_path / "out" / "attacks.json").read_text())
    assert [attack["word"] for attack in told["attacks"]] == ["iPod", "pizza"]
    assert all(attack["oracle"] == {} for attack in told["attacks"])
    (rows,) = told["summary"].values()
    assert rows["attacked"]["attacks"] == 2 and "oracle_label" not in rows["attacked"]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 3 * 128
    assert "apple, iPod, pizza" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "a"], "classes must name at least two"),
        (["--classes", "a", "b", "--words", "c"], "words must be among classes; got 'c'"),
        (["--words", "c"], "words must be among classes"),
        (["--eta", "1.5"], r"eta must lie in \[0, 1\]"),
        (["--text-height", "0"], "text_height must lie in"),
        (["--num-variations", "0"], "num_variations must be at least 1"),
        (["--place", "left"], "place"),
        (["--pictures", "BAD"], "none can be read"),
        (["--pictures", "[]"], "pictures must name"),
    ],
)
def test_bad_input_ends_in_one_line(
    words: list[str],
    said: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    words = [str(tmp_path / "bad.png") if word == "BAD" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--model", str(tiny_model), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error[-1].startswith("error: ")
    assert re.search(said, error[-1]), error
