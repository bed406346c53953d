"""What is computed of features: distances of sets, agreement with captions, likeness to the truth.

Sets are compared by torch-fidelity's own functions. Each function takes features, whatever network
made them, and raises a one-line ValueError for too few of them or some that are not finite.

Shapes: S drawn pictures, R real ones, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.evaluation.intervals import percentile_interval, resampled

CHUNK = 1024
"""Rows of a matrix of distances at a time."""


def checked(features: Tensor, least: int, what: str) -> Tensor:
    """Features [S, D] in fp64.

    Raises:
        ValueError: there are fewer than `least`, or some are not finite.
    """
    if features.ndim != 2:
        raise ValueError(f"{what} must be [S, D]; got {list(features.shape)}: flatten them")
    if len(features) < least:
        raise ValueError(f"{what} must be at least {least}; got {len(features)}: draw more")
    if not features.isfinite().all():
        raise ValueError(
            f"{what} must be finite; got NaN or infinity among {list(features.shape)}: look at the "
            "pictures, or encode in float32"
        )
    return features.double()


def frechet(drawn: Tensor, real: Tensor) -> float:
    """Frechet distance of Gaussians fitted to [S, D] and [R, D] (FID; Heusel et al. 2017).

    It falls as sets grow, for a covariance of few pictures is too narrow in most directions:
    distances of sets of other sizes must not be compared.
    """
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    sets = checked(drawn, 2, "drawn pictures"), checked(real, 2, "reference pictures")
    a, b = (fid_features_to_statistics(features) for features in sets)
    return float(fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID])


def kid(
    drawn: Tensor, real: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018): mean and deviation over random subsets.

    Unbiased, so that it may be a little below 0.
    """
    from torch_fidelity.metric_kid import (
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    found = kid_features_to_metric(
        checked(drawn, subset_size, "drawn pictures, one kid_subset_size of them,"),
        checked(real, subset_size, "reference pictures, one kid_subset_size of them,"),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016) of logits [S, C]: mean and deviation over splits."""
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    found = isc_features_to_metric(
        checked(logits, splits, "drawn pictures, one a split,"), splits, True, seed
    )
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def precision_recall(drawn: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019)."""
    from torch_fidelity.metric_prc import (
        KEY_METRIC_PRECISION,
        KEY_METRIC_RECALL,
        prc_features_to_metric,
    )

    found = prc_features_to_metric(
        checked(drawn, neighbours + 1, "drawn pictures, one more than neighbours,"),
        checked(real, neighbours + 1, "reference pictures, one more than neighbours,"),
        prc_neighborhood=neighbours,
        prc_batch_size=CHUNK,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def cmmd(drawn: Tensor, real: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024): `scale` times the squared MMD of the
    kernel exp(-|a - b|^2 / 2 sigma^2), biased, over unit embeddings [S, D] and [R, D].

    torch-fidelity has this kernel but wants as many pictures in both sets; these need not be.
    """
    a = checked(drawn, 2, "drawn pictures")
    b = checked(real, 2, "reference pictures")

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        sums = [
            torch.exp(-torch.cdist(rows, y).square() / (2 * sigma**2)).sum()
            for rows in x.split(CHUNK)
        ]
        return float(sum(sums)) / (len(x) * len(y))

    return scale * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """[S] CLIPScore of pictures [S, D] and their captions [S, D]: max(100 cosine, 0), as
    torchmetrics has it (Hessel et al. 2021 scale by 2.5 in place of 100)."""
    pictures, captions = (checked(v, 1, "embeddings") for v in (images, texts))
    return (100 * F.cosine_similarity(pictures, captions)).clamp(min=0)


def mismatched(captions: Sequence[str], pool: Sequence[str], count: int, seed: int) -> Tensor:
    """[S, count] rows of `pool` whose text is another than the caption's, fixed by the seed.

    Raises:
        ValueError: the pool has too few texts.
    """
    texts = [_plain(text) for text in pool]
    first = {text: row for row, text in reversed(list(enumerate(texts)))}
    rows = np.array([first[text] for text in sorted(first)])
    order = sorted(first)
    if len(order) < count + 1:
        raise ValueError(
            f"settings.r_precision_captions must not exceed the distinct captions, {len(order)}; "
            f"got {count + 1}: lower it, or give more captions"
        )
    place = {text: k for k, text in enumerate(order)}
    chosen = []
    for k, caption in enumerate(captions):
        rng = np.random.default_rng([seed, k])
        own = place.get(_plain(caption), len(order))
        others = rng.choice(len(order) - (own < len(order)), count, replace=False)
        chosen.append(rows[others + (others >= own)])
    return torch.from_numpy(np.stack(chosen))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def r_precision(images: Tensor, texts: Tensor, pool: Tensor, others: Tensor) -> Tensor:
    """[S] bool: whether a picture's own caption is nearer to it than all its mismatched ones
    (AttnGAN's protocol, Xu et al. 2018, over a CLIP); a tie counts against it.

    Args:
        images: [S, D]. texts: [S, D] of their own captions.
        pool: [P, D] of captions. others: [S, count] rows of `pool`.
    """
    images, texts, pool = (
        F.normalize(checked(v, 1, "embeddings"), dim=-1) for v in (images, texts, pool)
    )
    own = (images * texts).sum(-1, keepdim=True)
    wrong = [
        torch.einsum("sd,scd->sc", a, pool[rows])
        for a, rows in zip(images.split(256), others.split(256), strict=True)
    ]
    return (own > torch.cat(wrong)).all(1)


def face_distances(drawn: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """[S] Face Semantic Distance and [S] Face Semantic Similarity: the L1 distance, summed over
    features, and the cosine of drawn [S, D] and true pictures [S, D] of the same captions."""
    a, b = checked(drawn, 1, "drawn pictures"), checked(true, 1, "true pictures")
    return (a - b).abs().sum(-1), F.cosine_similarity(a, b)


def diversity(
    pictures: Sequence[Tensor], distance: Callable[[Tensor, Tensor], Tensor]
) -> list[float]:
    """Of each caption's samples [K, 3, H, W] the mean distance over all pairs."""
    means = []
    for samples in pictures:
        if len(samples) < 2:
            raise ValueError(
                "samples_per_caption must be at least 2 for lpips_diversity; got "
                f"{len(samples)}: use 4"
            )
        a, b = zip(*combinations(range(len(samples)), 2), strict=True)
        means.append(distance(samples[list(a)], samples[list(b)]).mean().item())
    return means


def mean_of(values: Sequence[float]) -> Mapping[str, Any]:
    """A mean as a result file has it."""
    array = np.asarray(values, float)
    means = resampled(lambda rows: float(array[rows].mean()), len(array), resamples=1000)
    value = float(array.mean())
    return {
        "value": value,
        "count": len(array),
        "interval": list(percentile_interval(value, means)),
    }
