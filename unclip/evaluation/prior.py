"""How good a prior is by itself: its samples beside the true image embeddings of other captions.

`python -m unclip.evaluation.prior --model shapes` prints, as JSON: the Frechet distance between
sampled and true embeddings beside the real-to-real floor (RCG, Li et al. 2023), which share of the
true ones the samples reach, the spread among samples of one caption, and the cosine to the truth
beside two baselines, text_embed itself and the mean embedding. `--data` takes captioned pictures or
a folder of embeddings; without it held-out scenes of the built-in world are drawn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from unclip.clip import FrozenCLIP
from unclip.config import one_line_errors, parse, to_dict
from unclip.data.shapes import ShapesConfig, ShapesDataset, Split
from unclip.data.source import SourceConfig, open_source
from unclip.diffusion import make_generators
from unclip.hub import load_stages
from unclip.priors import Prior, PriorOptions


@dataclass(frozen=True, kw_only=True)
class PriorCheckConfig:
    """How a prior is measured."""

    model: str = "shapes"
    """A shipped name, a folder (a training run's too), or `org/name` on the Hub."""
    data: str | None = None
    """Captioned pictures or a folder of embeddings; None draws scenes of the built-in world."""
    floor: str | None = None
    """More of the same, whose distance to `data` is the floor; None takes `data`'s next samples."""
    split: Split = "held_out"
    """Which scenes of the built-in world."""
    num: int = 2000
    """Captions, an embedding each."""
    batch_size: int = 500
    """Captions at a time."""
    num_inference_steps: int = 32
    """Steps of a prior that has them."""
    sampler: str | None = None
    """One of the prior's own; None is its first."""
    guidance_scale: float = 1.0
    """Of the prior; 1 is off."""
    num_candidates: int = 2
    """Embeddings to choose from."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where it runs."""
    out: Path | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        if self.num < 8:
            raise ValueError(f"num must be at least 8; got {self.num}: use 2000")


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


def recall(generated: Tensor, real: Tensor, neighbours: int = 3) -> float:
    """Share of `real` [R, D] that lies no further from some of `generated` [S, D] than that one's
    `neighbours`-th nearest fellow (Kynkaanniemi et al. 2019). Swapped, it is the precision."""
    # The nearest of all is the sample itself.
    radius = torch.cdist(generated, generated).kthvalue(neighbours + 1, dim=1).values
    return (torch.cdist(real, generated) <= radius).any(dim=1).float().mean().item()


@torch.no_grad()
def measure(
    prior: Prior,
    clip: FrozenCLIP,
    captions: Sequence[str],
    truth: Tensor,
    other: Tensor,
    *,
    batch_size: int = 500,
    **options: Any,
) -> dict[str, Any]:
    """Sample one embedding for each caption, and four for some of them.

    Args:
        prior: what is measured. clip: what it stands on.
        captions: S of them. truth: [S, D] the embeddings of their own pictures.
        other: [R, D] true embeddings of other pictures, for the floor.
        batch_size: captions at a time.
        options: fields of `PriorOptions`.
    """
    text = clip.encode_text(captions)
    count = len(captions)
    generators = make_generators(0, count)
    parts, seconds = [], 0.0
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        began = time.perf_counter()
        part = prior.sample(text.rows(rows), generators=generators[rows], **options)
        parts.append(part.float())
        seconds += time.perf_counter() - began
    sampled = torch.cat(parts)
    few = min(count, 64)
    repeated = text.rows(torch.arange(few, device=truth.device).repeat_interleave(4))
    again = prior.sample(repeated, generators=make_generators(1, 4 * few), **options)
    again = F.normalize(again.float().unflatten(0, (few, 4)), dim=-1)
    pairs = torch.einsum("bkd,bld->bkl", again, again)
    between = ((pairs.sum((1, 2)) - 4) / 12).mean().item()

    def cosine(a: Tensor, b: Tensor = truth) -> float:
        return F.cosine_similarity(a, b).mean().item()

    return {
        "kind": prior.kind,
        "parameters": sum(p.numel() for p in prior.network.parameters()),
        "captions": count,
        "milliseconds_a_sample": 1000 * seconds / count,
        "frechet_sampled_to_real": frechet_distance(sampled, truth),
        "frechet_real_to_real": frechet_distance(other, truth),
        "frechet_text_embed_to_real": frechet_distance(text.text_embed, truth),
        "cosine_sampled": cosine(sampled),
        "cosine_text_embed": cosine(text.text_embed),
        "cosine_mean_embed": cosine(truth.mean(0, keepdim=True)),
        "recall": recall(sampled, truth),
        "precision": recall(truth, sampled),
        "recall_of_real": recall(other, truth),
        "cosine_between_samples_of_one_caption": between,
        "cosine_sampled_to_text_embed": cosine(sampled, text.text_embed),
    }


def _samples(
    dataset: Dataset[Any], rows: Sequence[int], clip: FrozenCLIP
) -> tuple[list[str], Tensor]:
    """Captions and true embeddings of some rows."""
    fetch = getattr(dataset, "__getitems__", lambda rows: [dataset[row] for row in rows])
    captions, embeds = [], []
    for start in range(0, len(rows), 64):
        samples = fetch(rows[start : start + 64])
        captions += [sample["caption"] for sample in samples]
        embeds.append(clip.encode_samples(samples))
    return captions, torch.cat(embeds)


def run(config: PriorCheckConfig) -> dict[str, Any]:
    """Measure one model's prior."""
    stages = load_stages(config.model, device=config.device, only={"clip", "prior"})
    clip, prior = stages.clip, stages.prior
    assert clip is not None and prior is not None
    dataset: Any
    other: Any
    if config.data is None:
        world = ShapesConfig(split=config.split, image_size=clip.required_image_size())
        dataset = other = ShapesDataset(world)
    else:
        size = clip.image_size or 64
        dataset = other = open_source(SourceConfig(data=config.data, image_size=size))
        if config.floor is not None:
            other = open_source(SourceConfig(data=config.floor, image_size=size))
    twice = 1 if config.floor else 2
    for name, source, needed in (
        ("data", dataset, twice * config.num),
        ("floor", other, config.num),
    ):
        if len(source) < needed:
            raise ValueError(
                f"{name} must hold at least {needed} samples for num {config.num}; got "
                f"{len(source)}: use --num {len(source) * config.num // needed}"
            )
    rows = range(config.num, 2 * config.num)
    if config.floor is not None:  # files may come sorted by subject
        rows = range(0, len(other), len(other) // config.num)[: config.num]
    captions, truth = _samples(dataset, range(config.num), clip)
    _, elsewhere = _samples(other, rows, clip)
    options = {
        name: getattr(config, name)
        for name in ("num_inference_steps", "sampler", "guidance_scale", "num_candidates")
    }
    prior.check_options(PriorOptions(**options))
    measured = measure(
        prior, clip, captions, truth, elsewhere, batch_size=config.batch_size, **options
    )
    return {"settings": to_dict(config), **measured}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print JSON."""
    with one_line_errors():
        config = parse(PriorCheckConfig, argv, description=__doc__)
        result = json.dumps(run(config), indent=2)
        print(result)
        if config.out is not None:
            config.out.parent.mkdir(parents=True, exist_ok=True)
            config.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
