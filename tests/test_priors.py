"""Priors: statistics, candidates, guidance, and what a checkpoint keeps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip.clip import Text
from unclip.diffusion import make_generators
from unclip.priors import DiffusionPrior, best_candidate


@pytest.fixture
def prior(tiny_model: Path) -> DiffusionPrior:
    return DiffusionPrior.load(tiny_model / "prior")


@pytest.fixture
def text() -> Text:
    """Three captions of 5, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(0)
    embed = F.normalize(torch.randn(3, 16, generator=generator), dim=-1)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3], [1]])
    return Text(embed, torch.randn(3, 5, 32, generator=generator), mask)


def draw(
    prior: DiffusionPrior, text: Text, rows: Sequence[int] = (0, 1, 2), **options: Any
) -> Tensor:
    """Embeddings for some of the captions, each with the generator that its place gives it."""
    generators = make_generators(7, 3)
    return prior.sample(
        text.rows(list(rows)),
        generators=[generators[row] for row in rows],
        **{"num_inference_steps": 4} | options,
    )


def test_statistics_are_required_and_never_defaulted(
    prior: DiffusionPrior, text: Text, tmp_path: Path
) -> None:
    fresh = DiffusionPrior(prior.config)
    said = "statistics must be set before it is used"
    for use in (fresh.normalize, fresh.denormalize):
        with pytest.raises(ValueError, match=said):
            use(text.text_embed)
    with pytest.raises(ValueError, match=said):
        draw(fresh, text)
    with pytest.raises(ValueError, match=said):
        fresh.save(tmp_path / "prior")
    with pytest.raises(ValueError, match="at least 2 embeddings; got 1"):
        fresh.fit_statistics(text.text_embed[:1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": None}, "lacks mean"),
        ({"std": torch.zeros(16)}, "statistics must be set"),
        ({"mean": torch.full((16,), torch.nan)}, "statistics must be set"),
    ],
)
def test_a_checkpoint_without_statistics_is_refused(
    prior: DiffusionPrior, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    prior.save(tmp_path / "prior")
    weights = tmp_path / "prior/model.safetensors"
    tensors = load_file(weights) | change
    save_file({k: v for k, v in tensors.items() if v is not None}, weights)
    with pytest.raises(ValueError, match=said):
        DiffusionPrior.load(tmp_path / "prior")


def test_normalised_embeddings_have_unit_variance_and_come_back(prior: DiffusionPrior) -> None:
    embeds = F.normalize(torch.randn(500, 16) + 0.3, dim=-1)
    prior.fit_statistics(embeds)
    x_0 = prior.normalize(embeds)
    torch.testing.assert_close(x_0.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    assert x_0.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert prior.std.unique().numel() == 1  # one scale: directions keep their variances
    torch.testing.assert_close(prior.denormalize(x_0), embeds)


def test_only_embeddings_on_the_sphere_are_put_back_on_it(prior: DiffusionPrior) -> None:
    x_0 = torch.randn(4, 16)
    torch.testing.assert_close(prior.denormalize(x_0).norm(dim=1), torch.ones(4))
    prior.config = replace(prior.config, unit_norm=False)
    torch.testing.assert_close(prior.normalize(prior.denormalize(x_0)), x_0)


def test_the_best_candidate_has_the_highest_dot_product() -> None:
    candidates = torch.tensor([[[1.0, 0], [0, 2]], [[3, 0], [0, 1]]])  # not the highest cosine
    text_embed = torch.tensor([[0.6, 0.5], [0.2, 0.5]])
    assert best_candidate(candidates, text_embed).tolist() == [[0, 2], [3, 0]]


def test_more_candidates_come_closer_to_the_text(prior: DiffusionPrior, text: Text) -> None:
    one = draw(prior, text, num_candidates=1)
    many = draw(prior, text, num_candidates=8)
    assert one.shape == many.shape == (3, 16)
    score = [(embed * text.text_embed).sum() for embed in (one, many)]
    assert score[1] > score[0]
    with pytest.raises(ValueError, match="num_candidates must be at least 1; got 0"):
        draw(prior, text, num_candidates=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_embedding_is_the_same_alone_and_in_a_batch(
    prior: DiffusionPrior, text: Text, guidance_scale: float
) -> None:
    options = {"num_candidates": 3, "guidance_scale": guidance_scale}
    together = draw(prior, text, **options)
    for row in range(3):
        alone = draw(prior, text, [row], **options)
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=0)
    assert torch.equal(draw(prior, text, **options), together)


def test_guidance_1_is_no_guidance(
    prior: DiffusionPrior, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly = draw(prior, text, guidance_scale=1 + 1e-6)
    assert (draw(prior, text, guidance_scale=3.0) - nearly).abs().max() > 1e-2
    encode, calls = prior.network.encode_context, []
    monkeypatch.setattr(
        prior.network, "encode_context", lambda **options: calls.append(1) or encode(**options)
    )
    torch.testing.assert_close(draw(prior, text, guidance_scale=1.0), nearly, atol=1e-4, rtol=0)
    assert len(calls) == 1  # the null context is not even computed


def test_saving_and_loading_changes_no_sample(
    prior: DiffusionPrior, text: Text, tmp_path: Path
) -> None:
    prior.save(tmp_path / "prior")
    loaded = DiffusionPrior.load(tmp_path / "prior")
    assert loaded.config == prior.config
    assert not loaded.training
    assert torch.equal(draw(loaded, text), draw(prior, text))


def test_a_prior_of_another_kind_is_refused(prior: DiffusionPrior, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior")
    path = tmp_path / "prior/config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"kind": "linear"}))
    with pytest.raises(ValueError, match="holds a prior of kind 'linear'"):
        DiffusionPrior.load(tmp_path / "prior")
