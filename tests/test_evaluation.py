"""What is measured of a model: distances of embeddings, probes, the scores of a whole cascade."""

import json
from pathlib import Path

import pytest
import torch

from unclip.data.shapes import ShapesConfig, ShapesDataset
from unclip.evaluation.prior import frechet_distance, main, recall
from unclip.evaluation.probe import linear_probe, probe_clip
from unclip.evaluation.shapes import Text2ImageConfig, text2image
from unclip.pipeline import CascadeOptions, UnCLIP

# The tiny CLIP reads 20 tokens, and some captions of the shapes world have more.
pytestmark = pytest.mark.filterwarnings("ignore:the caption has more than 20 tokens")


def test_frechet_distance_of_known_gaussians() -> None:
    a = torch.randn(50_000, 4, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # A shifted mean costs its square; a doubled deviation costs (2 - 1)^2 in each dimension.
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 0, 0])) == pytest.approx(9, abs=1e-6)
    assert frechet_distance(a, (a - a.mean(0)) * 2 + a.mean(0)) == pytest.approx(4, rel=0.02)


def test_a_linear_probe_finds_what_is_linear_and_nothing_else() -> None:
    x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
    halves = x[:400], x[400:]
    linear = (x[:, 0] > 0).long()
    assert linear_probe(halves[0], linear[:400], halves[1], linear[400:]).float().mean() > 0.95
    xor = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    assert linear_probe(halves[0], xor[:400], halves[1], xor[400:]).float().mean() < 0.65


def test_a_clip_is_probed_for_each_object_and_relation(tiny_model: Path) -> None:
    clip = UnCLIP.from_pretrained(str(tiny_model)).clip
    result = probe_clip(clip, num_train=120, num_test=60)
    assert set(result["objects_1"]) == {"shape_1", "colour_1", "cell_1"}
    assert set(result["objects_2"]["shape_2"]) == {"all", "left", "above", "inside"}
    scores = [score for table in result["objects_2"].values() for score in table.values()]
    assert all(0 <= score <= 1 for score in scores)


def test_rows_of_a_data_set_are_embedded_a_few_at_a_time(tiny_model: Path) -> None:
    clip = UnCLIP.from_pretrained(str(tiny_model)).clip
    dataset = ShapesDataset(ShapesConfig())
    parts = clip.encode_rows(dataset, [5, 3, 8], batch_size=2)
    images = torch.stack([dataset[row]["image"] for row in (5, 3, 8)])  # type: ignore[misc]
    torch.testing.assert_close(parts, clip.encode_image(images), atol=1e-5, rtol=0)


def test_a_prior_is_measured_beside_its_baselines(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_model), "--num-inference-steps", "2", "--num-candidates", "1"]
    out = tmp_path / "out/prior.json"
    main([*options, "--num", "32", "--split", "train", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert result["captions"] == 32 and result["settings"]["split"] == "train"
    assert result["frechet_sampled_to_real"] > result["frechet_real_to_real"] > 0
    assert -1 <= result["cosine_sampled"] < result["cosine_mean_embed"] <= 1
    assert result["recall"] < result["recall_of_real"] <= 1
    # Other people's captioned pictures, ten of them.
    main([*options, "--num", "8", "--data", str(pictures), "--floor", str(pictures)])
    assert json.loads(capsys.readouterr().out)["captions"] == 8
    with pytest.raises(SystemExit):
        main([*options, "--num", "8", "--data", str(pictures)])
    assert "data must hold at least 16 samples for num 8; got 10" in capsys.readouterr().err


def test_recall_is_the_share_within_reach() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 4, generator=generator)
    same = torch.randn(400, 4, generator=generator)
    assert recall(same, real) > 0.85 and recall(real, same) > 0.85
    near_one = real[:1] + 0.1 * torch.randn(400, 4, generator=generator)
    assert recall(near_one, real) < 0.1  # one mode reaches little,
    assert recall(real, near_one) > 0.9  # and none of it is far off
    assert recall(real + 50, real) == recall(real, real + 50) == 0


def test_a_cascade_is_scored_on_the_world_it_is_told(tiny_model: Path) -> None:
    config = Text2ImageConfig(
        model=str(tiny_model),
        num=4,
        world=ShapesConfig(object_weights=(0, 1, 0), caption_detail="full"),
        given="mean",
        cascade=CascadeOptions(size=64, decoder_steps=2, upsampler_steps=2),
    )
    result = text2image(config)
    assert set(result["tables"]) == {"16px", "64px"}
    for table in result["tables"].values():
        assert set(table) == {"2", "all"}
        assert table["2"]["all"]["count"] == 4
    assert result["settings"]["world"]["split"] == "train"
