"""One call of a cascade: what its batches share, what it gives back, how it is stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unclip.diffusion import Resampling
from unclip.pipeline.options import CascadeOptions

StageCallback = Callable[[str, int, int, Tensor, Tensor], object]


class Cancelled(Exception):
    """A callback has stopped the drawing; its stage has gone back to where it waits."""


@dataclass(frozen=True)
class CascadeOutput:
    """B pictures and how they came about; tensors are fp32 on the CPU."""

    by_size: dict[int, Tensor]
    """Side S in px -> what that stage drew, [B, 3, S, S] in [-1, 1]; small to large."""
    image_embed: Tensor | None
    """[B, D] what the prior drew, or was given; None for a decoder that reads captions alone."""
    prompts: list[str | None]
    """The caption of each picture."""
    seeds: list[int]
    """The seed of each picture."""
    options: CascadeOptions
    """How they were drawn."""
    seconds: dict[str, float]
    """Stage -> wall-clock time."""

    @property
    def images(self) -> Tensor:
        """The largest pictures, [B, 3, S, S] in [-1, 1]."""
        return self.by_size[max(self.by_size)]


@dataclass
class Run:
    """What all batches of one call share."""

    options: CascadeOptions
    progress: bool
    callback: StageCallback | None
    known: dict[str, Tensor]
    resampling: Resampling | None
    seconds: dict[str, float]
    title: str = ""

    def bar(self, stage: str) -> str | None:
        return f"{stage}{self.title}" if self.progress else None

    def callback_of(self, stage: str) -> Callable[[int, int, Tensor, Tensor], None] | None:
        callback = self.callback
        if callback is None:
            return None

        def call(step: int, *state: Any) -> None:
            if callback(stage, step, *state) is False:
                raise Cancelled(f"cancelled in step {step + 1} of the {stage}")

        return call

    @contextmanager
    def timed(self, stage: str, device: torch.device) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels run on after the call has returned
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def picture_generators(seeds: Sequence[int], stage: str) -> list[torch.Generator]:
    """One CPU generator a picture, which depends on its seed and the stage alone."""
    digests = (hashlib.sha256(f"{stage}/{seed}".encode()).digest() for seed in seeds)
    # 32 bits are what torch's CPU generator keeps of a seed.
    return [torch.Generator("cpu").manual_seed(int.from_bytes(d[:4], "little")) for d in digests]
