"""Randomness of a step: a function of (seed, position of the sample), whatever the machine count.

Sample number p of a run draws its noise, timestep and dropped conditions from a generator of its
own. So they are the same on 2 processes of 4 samples, on one of 8, and on one of 4 twice over; and
a run that goes on needs no random state but the number of its step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.diffusion import NoiseSchedule


def sample_seed(stream: str, seed: int, position: int) -> int:
    """Seed of sample `position`; no two of a stream's first 2^32 are alike.

    Torch's CPU generator keeps 32 bits of its seed, so these are all there are.
    """
    start = int.from_bytes(hashlib.sha256(f"{stream} {seed}".encode()).digest()[:4], "little")
    return (start + position) % 2**32


class SampleGenerators(torch.Generator):
    """Generators of a batch, one a sample.

    Where torch asks for one generator it is that of the first sample, so that a batch drawn from it
    in one call is still a function of (seed, step), only no longer of each sample alone.

    Args:
        seeds: one a sample.
        device: where numbers are drawn.
    """

    def __new__(cls, seeds: Sequence[int], device: torch.device | str) -> SampleGenerators:
        return super().__new__(cls, device)  # type: ignore[call-arg]

    def __init__(self, seeds: Sequence[int], device: torch.device | str) -> None:
        self.seeds = list(seeds)
        self.manual_seed(self.seeds[0])
        self.samples = [torch.Generator(device).manual_seed(seed) for seed in self.seeds]


def each(generator: torch.Generator, count: int) -> torch.Generator | list[torch.Generator]:
    """One generator for each of `count` pictures where the batch has them: what `degrade` takes."""
    if isinstance(generator, SampleGenerators) and count == len(generator.samples):
        return generator.samples
    return generator


def _drawn(
    function: str, generator: torch.Generator, shape: Sequence[int], device: torch.device
) -> Tensor:
    draw = getattr(torch, function)
    if not isinstance(generator, SampleGenerators):
        return draw(tuple(shape), generator=generator, device=device)
    repeats, rest = divmod(shape[0], len(generator.samples))
    if rest:
        raise ValueError(
            f"a batch of {len(generator.samples)} samples draws a multiple of that many rows; got "
            f"{shape[0]}: give the rows the batch's order, over and over"
        )
    rows = [draw((repeats, *shape[1:]), generator=g, device=device) for g in generator.samples]
    return torch.stack(rows, dim=1).flatten(0, 1)


def uniform(generator: torch.Generator, *shape: int, device: torch.device) -> Tensor:
    """Numbers of `shape` uniform in [0, 1); row r is drawn for sample r modulo the batch."""
    return _drawn("rand", generator, shape, device)


def normal(generator: torch.Generator, *shape: int, device: torch.device) -> Tensor:
    """Numbers of `shape` from N(0, 1); row r is drawn for sample r modulo the batch."""
    return _drawn("randn", generator, shape, device)


def draw(
    x_0: Tensor, schedule: NoiseSchedule, generator: torch.Generator, shift: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Timesteps [B] and Gaussian noise of x_0's shape, both from `generator`.

    Uniform u in [0, 1) is moved to shift u / (1 + (shift - 1) u) (Esser et al. 2024, equation 23):
    1 leaves the timesteps uniform, above 1 the noisy ones are drawn more often.
    """
    u = uniform(generator, len(x_0), device=x_0.device)
    u = shift * u / (1 + (shift - 1) * u)
    steps = schedule.config.num_train_timesteps
    timesteps = (u * steps).long().clamp(max=steps - 1)
    return timesteps, normal(generator, *x_0.shape, device=x_0.device)
