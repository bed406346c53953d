"""How good a prior is by itself: its samples beside the true image embeddings of held-out captions.

`python -m unclip.evaluation.prior --model shapes` prints, as JSON: the Frechet distance between
sampled and true embeddings beside the real-to-real floor (RCG, Li et al. 2023), the spread among
samples of one caption, and the cosine to the truth beside two baselines, text_embed itself and the
mean embedding.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip import FrozenCLIP
from unclip.data.shapes import ShapesConfig, ShapesDataset, Split
from unclip.diffusion import make_generators
from unclip.hub import load_stages
from unclip.priors import Prior


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of embeddings [S, D] and [R, D].

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in fp64; 0 for equal Gaussians.
    """
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of C_a C_b are those of a positive semidefinite matrix: real, and at least 0.
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * root).item()


def measure(
    clip: FrozenCLIP,
    prior: Prior,
    *,
    count: int,
    num_inference_steps: int,
    sampler: str,
    num_candidates: int,
    split: Split = "held_out",
) -> dict[str, Any]:
    """Sample one embedding for each of `count` captions, and four for some of them."""
    dataset = ShapesDataset(ShapesConfig(split=split, image_size=clip.required_image_size()))
    truth = clip.encode_rows(dataset, range(count))
    other = clip.encode_rows(dataset, range(count, 2 * count))
    captions = [dataset.scene(row)[1].text for row in range(count)]
    text = clip.encode_text(captions)
    options: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "sampler": sampler,
        "num_candidates": num_candidates,
    }
    sampled = prior.sample(text, generators=make_generators(0, count), **options)
    few = min(count, 64)
    repeated = text.rows(torch.arange(few, device=truth.device).repeat_interleave(4))
    generators = make_generators(1, 4 * few)
    again = prior.sample(repeated, generators=generators, **options).unflatten(0, (few, 4))
    pairs = torch.einsum("bkd,bld->bkl", F.normalize(again, dim=-1), F.normalize(again, dim=-1))
    off_diagonal = (pairs.sum((1, 2)) - 4) / 12
    mean = truth.mean(0, keepdim=True)

    def cosine(a: Tensor) -> float:
        return F.cosine_similarity(a, truth).mean().item()

    return {
        "captions": count,
        "split": split,
        **options,
        "frechet_sampled_to_real": frechet_distance(sampled, truth),
        "frechet_real_to_real": frechet_distance(other, truth),
        "frechet_text_embed_to_real": frechet_distance(text.text_embed, truth),
        "cosine_sampled": cosine(sampled),
        "cosine_text_embed": cosine(text.text_embed),
        "cosine_mean_embed": cosine(mean),
        "cosine_between_samples_of_one_caption": off_diagonal.mean().item(),
        "cosine_sampled_to_text_embed": F.cosine_similarity(sampled, text.text_embed).mean().item(),
        "cosine_truth_to_text_embed": cosine(text.text_embed),
    }


def main() -> None:
    """Measure one model's prior and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shapes", help="shipped name, folder or org/name")
    parser.add_argument("--num", type=int, default=2000, help="captions")
    parser.add_argument("--split", default="held_out", choices=get_args(Split))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--num-candidates", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    stages = load_stages(a.model, device=a.device, only={"clip", "prior"})
    assert stages.clip is not None and stages.prior is not None
    result = measure(
        stages.clip,
        stages.prior,
        count=a.num,
        num_inference_steps=a.steps,
        sampler=a.sampler,
        num_candidates=a.num_candidates,
        split=a.split,
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
