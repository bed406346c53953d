"""Metrics of two sets as functions of which pictures were drawn: what a bootstrap redraws.

Each takes features of a reference [M, D] and of drawn pictures [N, D], computes once what no choice
of rows changes, and returns a function of rows [N] that were drawn with replacement. A picture that
is there twice is never held against itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Statistic = Callable[[np.ndarray], float]


def frechet_to(reference: np.ndarray, features: np.ndarray) -> Statistic:
    """The Frechet distance between rows of `features` [N, D] and a reference [M, D].

    As `frechet_distance`, with what the reference alone decides computed once: the eigenvalues of
    C_r^(1/2) C C_r^(1/2) are the squared singular values of the centred rows times C_r^(1/2).
    """
    mean = reference.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(reference - mean, rowvar=False)))
    values = values.clip(min=0)
    drawn = features - mean
    seen_through = drawn @ (vectors * np.sqrt(values)) @ vectors.T
    squares = np.square(drawn).sum(1)

    def distance(rows: np.ndarray) -> float:
        # A picture that was drawn several times has a weight instead of several rows.
        times = np.bincount(rows, minlength=len(drawn))
        there, unbiased = times > 0, len(rows) / (len(rows) - 1)
        share = times[there] / len(rows)
        offset = np.square(share @ drawn[there]).sum()
        spread = unbiased * (share @ squares[there] - offset)
        seen = seen_through[there]
        seen = (seen - share @ seen) * np.sqrt(unbiased * share)[:, None]
        small = seen @ seen.T if len(seen) < len(mean) else seen.T @ seen
        overlap = np.sqrt(np.linalg.eigvalsh(small).clip(min=0)).sum()
        return float(offset + spread + values.sum() - 2 * overlap)

    return distance


def cmmd_to(
    reference: np.ndarray, features: np.ndarray, sigma: float = 10.0, scale: float = 1000.0
) -> Statistic:
    """CMMD (Jayasumana et al. 2024) between rows of `features` [N, D] and a reference [M, D]:
    `scale` times the biased squared MMD of a Gaussian kernel over unit embeddings, whose kernel of
    all pairs is computed once."""
    real, drawn = (
        x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (reference, features)
    )

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        # Of unit vectors |a - b|^2 = 2 - 2 a b.
        return np.exp((x @ y.T - 1) / sigma**2)

    within, across = kernel(drawn, drawn), kernel(drawn, real).mean(1)
    among = kernel(real, real).mean()

    def distance(rows: np.ndarray) -> float:
        share = np.bincount(rows, minlength=len(drawn)) / len(rows)
        return float(scale * (share @ within @ share + among - 2 * share @ across))

    return distance


def kid_to(reference: np.ndarray, features: np.ndarray) -> Statistic:
    """KID (Binkowski et al. 2018): the unbiased squared MMD of the kernel (x y / D + 1)^3, of the
    whole sets where the metric itself is a mean over subsets."""
    real, drawn = (x.astype(np.float64) for x in (reference, features))

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def no_diagonal(square: np.ndarray) -> np.ndarray:
        np.fill_diagonal(square, 0)
        return square

    within, across = no_diagonal(kernel(drawn, drawn)), kernel(drawn, real).mean(1)
    among = no_diagonal(kernel(real, real)).sum() / (len(real) * (len(real) - 1))

    def distance(rows: np.ndarray) -> float:
        share = np.bincount(rows, minlength=len(drawn)) / len(rows)
        of_pairs = 1 - share @ share  # of two different pictures
        return float(share @ within @ share / of_pairs + among - 2 * share @ across)

    return distance


def precision_to(reference: np.ndarray, features: np.ndarray, neighbours: int) -> Statistic:
    """Precision (Kynkaanniemi et al. 2019): the share of drawn pictures within reach of a real one,
    which reaches as far as its so-manieth neighbour."""
    reach = _reach(_distances(reference, reference), neighbours)
    within = np.any(_distances(features, reference) <= reach, axis=1)
    return lambda rows: float(within[rows].mean())


def recall_to(reference: np.ndarray, features: np.ndarray, neighbours: int) -> Statistic:
    """Recall (Kynkaanniemi et al. 2019): the share of real pictures within reach of a drawn one."""
    among, across = _distances(features, features), _distances(reference, features)

    def recall(rows: np.ndarray) -> float:
        there = np.unique(rows)
        reach = _reach(among[np.ix_(there, there)], neighbours)
        return float(np.any(across[:, there] <= reach, axis=1).mean())

    return recall


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = x.astype(np.float64), y.astype(np.float64)
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(squares.clip(min=0))


def _reach(distances: np.ndarray, neighbours: int) -> np.ndarray:
    return np.partition(distances, neighbours, axis=1)[:, neighbours]  # the nearest is itself
