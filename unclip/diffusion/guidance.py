"""Classifier-free guidance (Ho & Salimans 2022), the one copy of it.

Legend: B batch. A network is `network(x_t, timesteps, context)`; a context is a dict of tensors
whose first dimension is the batch, or None for a condition that the model does without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Context: TypeAlias = Mapping[str, Tensor | None]
Network: TypeAlias = Callable[[Tensor, Tensor, dict[str, Tensor | None]], Tensor]


def guided(
    network: Network,
    x_t: Tensor,
    timesteps: Tensor,
    context: Context,
    null_context: Context | None,
    guidance_scale: float,
    learned_variance: bool = False,
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
        return torch.cat([uncond + guidance_scale * (cond - uncond), variance], dim=1)
    return uncond + guidance_scale * (cond - uncond)


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
