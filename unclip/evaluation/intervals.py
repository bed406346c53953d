"""How sure a number is: Wilson's interval of a fraction, and the bootstrap.

Shapes: N pictures, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

LEVEL = 0.95


def wilson(hits: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a fraction `hits` / `count`; (0, 1) when nothing was counted.

    (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927. Halves are hits too.
    """
    if count == 0:
        return 0.0, 1.0
    p, zz = hits / count, z * z / count
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / count + zz / (4 * count))
    return max(0.0, (middle - half) / (1 + zz)), min(1.0, (middle + half) / (1 + zz))


def resampled(
    statistic: Callable[..., float],
    *counts: int,
    resamples: int,
    seed: int = 0,
) -> np.ndarray:
    """A statistic's values [R] over R resamples.

    Args:
        statistic: takes row numbers [N] drawn with replacement, an array for each of `counts`.
        counts: N of each set; sets that are paired are one.
    """
    rng = np.random.default_rng(seed)
    return np.array(
        [statistic(*(rng.integers(n, size=n) for n in counts)) for _ in range(resamples)]
    )


def percentile_interval(
    value: float, found: np.ndarray, *, centred: bool = False
) -> tuple[float, float]:
    """The 95% percentile interval (Efron 1979) of a statistic from its values [R] on resamples.

    Args:
        value: the statistic itself.
        found: what the resamples gave; NaN is left out.
        centred: put the resamples' spread around `value` instead of where it lies. A distance of
            distributions is larger on a resample, which has pictures twice, than on its set.
    """
    found = found[np.isfinite(found)]
    shift = value - found.mean() if centred else 0.0
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low + shift), float(high + shift)
