"""Classifier-free guidance (Ho & Salimans 2022), the one copy of it.

Legend: B batch. A network is `network(x_t, timesteps, context)`; a context is a dict of tensors
whose first dimension is the batch, or None for a condition that the model does without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Context: TypeAlias = Mapping[str, Tensor | None]
Network: TypeAlias = Callable[[Tensor, Tensor, dict[str, Tensor | None]], Tensor]


@dataclass(frozen=True, kw_only=True)
class GuidanceLimits:
    """What keeps guidance from overdoing it; the defaults leave it alone."""

    interval: tuple[float, float] = (0.0, 1.0)
    """Guidance acts between these noise levels t / T alone (Kynkaanniemi et al. 2024)."""
    rescale: float = 0.0
    """How far the guided output's standard deviation is brought back to the conditional one's, 0 to
    1 (Lin et al. 2023, section 3.4: 0.7)."""
    dynamic_threshold: float | None = None
    """The share of x_0's values that stay within range: where more of them do not, all are divided
    by what that share stays below (Imagen, Saharia et al. 2022: 0.995). None clamps."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance_interval must be two numbers from 0 to 1, the lower first; got "
                f"{list(self.interval)}: use 0 1 for all of the chain"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(
                f"guidance_rescale must lie in [0, 1]; got {self.rescale}: use 0.7, or 0 for none"
            )
        if self.dynamic_threshold is not None and not 0 < self.dynamic_threshold <= 1:
            raise ValueError(
                f"dynamic_threshold must lie in (0, 1]; got {self.dynamic_threshold}: use 0.995"
            )

    def scale_at(self, guidance_scale: float, level: float) -> float:
        """The scale at a noise level t / T."""
        return guidance_scale if self.interval[0] <= level <= self.interval[1] else 1.0

    def clamp(self, x_0: Tensor, limit: float) -> Tensor:
        """x_0 [B, ...] within +- `limit`."""
        if self.dynamic_threshold is not None:
            largest = x_0.abs().flatten(1).quantile(self.dynamic_threshold, dim=1).clamp(min=limit)
            largest = largest.reshape(-1, *[1] * (x_0.ndim - 1))
            x_0 = x_0.clamp(-largest, largest) * (limit / largest)
        return x_0.clamp(-limit, limit)


UNLIMITED = GuidanceLimits()


def guided(
    network: Network,
    x_t: Tensor,
    timesteps: Tensor,
    context: Context,
    null_context: Context | None,
    guidance_scale: float,
    learned_variance: bool = False,
    rescale: float = 0.0,
) -> Tensor:
    """The network's output, moved from the unconditional one through the conditional one.

    A scale of 1, or no `null_context`, is the plain conditional call and 0 the unconditional one.
    Any other is one call on a doubled batch, in the order [unconditional, conditional].

    Args:
        network: called with x_t [B, ...], timesteps [B] and a context, or with 2B of each.
        x_t: noisy samples [B, ...].
        timesteps: integer [B].
        context: the condition, batch B.
        null_context: what stands for "no condition"; same keys and shapes as `context`.
        guidance_scale: 0 or more.
        learned_variance: the second half of the output's channels is a variance: it is not
            extrapolated but taken from the conditional output.
        rescale: see `GuidanceLimits`.

    Raises:
        ValueError: the scale is negative, or the two contexts do not match.
    """
    check_guidance_scale(guidance_scale)
    if guidance_scale == 1 or null_context is None:
        return network(x_t, timesteps, dict(context))
    if guidance_scale == 0:
        return network(x_t, timesteps, dict(null_context))

    both = network(
        torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), join(null_context, context)
    )
    uncond, cond = both.chunk(2)
    if learned_variance:
        uncond, _ = uncond.chunk(2, dim=1)
        cond, variance = cond.chunk(2, dim=1)
        return torch.cat([_extrapolated(uncond, cond, guidance_scale, rescale), variance], dim=1)
    return _extrapolated(uncond, cond, guidance_scale, rescale)


def _extrapolated(uncond: Tensor, cond: Tensor, guidance_scale: float, rescale: float) -> Tensor:
    output = uncond + guidance_scale * (cond - uncond)
    if rescale == 0:
        return output
    ratio = cond.flatten(1).std(dim=1) / output.flatten(1).std(dim=1)
    return output * (1 + rescale * (ratio - 1)).reshape(-1, *[1] * (output.ndim - 1))


def check_guidance_scale(guidance_scale: float) -> None:
    """Raise ValueError unless the scale is 0 or more."""
    if not guidance_scale >= 0:
        raise ValueError(
            "guidance_scale must not be negative; "
            f"got {guidance_scale}: use 1 for no guidance, above 1 for more of the condition"
        )


def join(null_context: Context, context: Context) -> dict[str, Tensor | None]:
    """Two contexts of B rows as one of 2B, [unconditional, conditional].

    Raises:
        ValueError: they do not match.
    """
    if null_context.keys() != context.keys():
        raise ValueError(
            "null_context must have the keys of context; "
            f"got {sorted(null_context)} against {sorted(context)}: build both the same way"
        )
    joined: dict[str, Tensor | None] = {}
    for key, cond in context.items():
        uncond = null_context[key]
        if cond is None and uncond is None:
            joined[key] = None
        elif cond is None or uncond is None:
            raise ValueError(
                f"null_context[{key!r}] must be None exactly where context[{key!r}] is; "
                "got one of each: give the null condition as a tensor"
            )
        else:
            joined[key] = torch.cat([uncond, cond])
    return joined
