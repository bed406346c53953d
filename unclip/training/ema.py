"""Averaged weights, beside the ones in training or in place of them, sharded or whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name: what is optimised, averaged and checkpointed."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process has to ask for it at the same time."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


class Average:
    """The exponential moving average of a module's trained weights, sharded as they are.

    Args:
        module: prepared for training.
        decay: 0 turns it off, and the weights stand for their own average.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = trained(module)
        self.ema = EMAModel(self.parameters.values(), decay=decay) if decay > 0 else None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        if self.ema is None:
            return dict(self.parameters)
        return dict(zip(self.parameters, self.ema.shadow_params, strict=True))

    @property
    def steps(self) -> int:
        """Optimizer steps that went into it."""
        return 0 if self.ema is None else self.ema.optimization_step

    @steps.setter
    def steps(self, value: int) -> None:
        if self.ema is not None:
            self.ema.optimization_step = value

    def step(self) -> None:
        """Take up the weights after an optimizer step."""
        if self.ema is not None:
            self.ema.step(self.parameters.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the module holds the averaged weights, and the average the others."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self.ema is None:
            return
        for parameter, average in zip(
            self.parameters.values(), self.ema.shadow_params, strict=True
        ):
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)


class WholeCopy:
    """A copy of what is trained that holds the averaged weights, in one piece, on the CPU.

    Stages are exported and pictures drawn from it: training goes on in the meantime, and neither
    needs to know how the weights are sharded.

    Args:
        module: before it is prepared for training. Modules in its tuple `frozen` are not copied.
        wanted: whether this process is to have the copy; the others only help to gather it.
    """

    def __init__(self, module: nn.Module, wanted: bool) -> None:
        frozen = getattr(module, "frozen", ())
        memo = {id(helper): helper for helper in frozen}
        self.module: Any = copy.deepcopy(module, memo).cpu().eval() if wanted else None

    @torch.no_grad()
    def take(self, average: Average, buffers: Mapping[str, Tensor]) -> None:
        """Copy the averaged weights, gathered from all processes, and the buffers."""
        own: dict[str, Tensor] = {}
        if self.module is not None:
            own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        for name, tensor in {**average.tensors, **buffers}.items():
            tensor = whole(tensor)
            if own:
                own[name].copy_(tensor)
