"""Resampling (RePaint, Lugmayr et al. 2022): a network that was never shown what is known goes up
and down the chain until what it draws fits what is known.

Legend: N steps of the chain, whose places count N - 1 .. 0; x_0 itself is at place -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How often, and how far, sampling goes back up (RePaint, section 4.2)."""

    jump_length: int = 5
    """Steps of one jump back; the paper takes 10 of 250."""
    num_resamples: int = 5
    """How often each stretch of that length is drawn; 1 never goes back. The paper takes 10."""

    def __post_init__(self) -> None:
        for name in ("jump_length", "num_resamples"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}: use "
                    f"{type(self).__dataclass_fields__[name].default}"
                )

    def places(self, num_steps: int) -> list[int]:
        """The places of a chain of N steps in the order in which they are visited."""
        places: list[int] = []
        for top in range(num_steps - 1, -1, -self.jump_length):
            stretch = range(top, max(top - self.jump_length, -1), -1)
            places += [*stretch] * self.num_resamples
        return places


def renoise(
    x: Tensor,
    alpha_bar: Tensor,
    place: int,
    higher: int,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Samples [B, ...] at a place of the chain with noise up to a higher one: q(x_higher | x).

    Args:
        x: [B, ...] samples.
        alpha_bar: [N] of the chain.
        place: where they are; -1 is x_0.
        higher: where to.
        generators: one a sample.
    """
    here = alpha_bar[place] if place >= 0 else alpha_bar.new_ones(())
    ratio = float(alpha_bar[higher] / here)
    noise = randn_tensor(x.shape, generator=list(generators), device=x.device, dtype=x.dtype)
    return ratio**0.5 * x + (1 - ratio) ** 0.5 * noise
