"""Gaussian diffusion as mathematics that knows no network: the noise schedule, the three
prediction targets and their loss, classifier-free guidance, and one sampling loop over diffusers'
schedulers. Prior embeddings [B, D] and decoder images [B, C, H, W] share all of it, and training
and sampling read the same schedule."""

from unclip.diffusion.analytic import measure_eps_power
from unclip.diffusion.flow import (
    FLOW_SAMPLERS,
    FlowConfig,
    flow_loss,
    flow_path,
    flow_times,
    sample_flow,
)
from unclip.diffusion.guidance import Context, GuidanceLimits, Network, guided, join
from unclip.diffusion.objective import NoiseSchedule, diffusion_loss, loss_weight
from unclip.diffusion.resampling import Resampling
from unclip.diffusion.sampling import invert, make_generators, sample
from unclip.diffusion.schedule import (
    SAMPLERS,
    DiffusionConfig,
    alpha_bars,
    make_scheduler,
    sampling_timesteps,
)

__all__ = [
    "FLOW_SAMPLERS",
    "SAMPLERS",
    "Context",
    "DiffusionConfig",
    "FlowConfig",
    "GuidanceLimits",
    "Network",
    "NoiseSchedule",
    "Resampling",
    "alpha_bars",
    "diffusion_loss",
    "flow_loss",
    "flow_path",
    "flow_times",
    "guided",
    "invert",
    "join",
    "loss_weight",
    "make_generators",
    "make_scheduler",
    "measure_eps_power",
    "sample",
    "sample_flow",
    "sampling_timesteps",
]
