"""The cascade (paper, section 2): CLIP, prior, decoder and upsamplers, run one after the other."""

from unclip.pipeline.cascade import UnCLIP
from unclip.pipeline.options import CascadeOptions, check_prompt
from unclip.pipeline.run import Cancelled, CascadeOutput, StageCallback, picture_generators

__all__ = [
    "Cancelled",
    "CascadeOptions",
    "CascadeOutput",
    "StageCallback",
    "UnCLIP",
    "check_prompt",
    "picture_generators",
]
