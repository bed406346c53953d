"""How a cascade is sampled."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from unclip.clip import split_weights
from unclip.diffusion import DiffusionConfig, GuidanceLimits, make_scheduler
from unclip.priors import KINDS, PriorOptions

Embed = Literal["prior", "text", "none"]


@dataclass(frozen=True, kw_only=True)
class CascadeOptions:
    """How a picture is drawn; with its caption and its seed, all that decides its pixels."""

    embed: Embed = "prior"
    """What the decoder is given for an image embedding (paper, section 5.1): what the prior draws;
    text_embed in its place; or none, which leaves the caption alone. A prior's options then have no
    say."""
    guidance_scale: float = 3.0
    """Of the decoder, 0 or more; 1 is off."""
    prior_guidance_scale: float = 1.0
    """Of the prior; guiding it hurt in the paper."""
    num_candidates: int = 2
    """Image embeddings drawn for each picture; the one closest to the caption is kept."""
    prior_steps: int = 32
    """Denoising steps of the prior."""
    decoder_steps: int = 30
    """Denoising steps of the decoder."""
    upsampler_steps: int = 12
    """Denoising steps of each upsampler."""
    prior_sampler: str | None = None
    """One of the prior's own; None is its first: `ddpm` of a diffusion prior, `heun` of a flow."""
    prior_temperature: float = 1.0
    """Of a prior that draws tokens, the autoregressive one."""
    prior_top_p: float = 1.0
    """Of a prior that draws tokens: the share of probability it draws from."""
    sampler: str = "ddim"
    """The decoder's."""
    upsampler_sampler: str = "ddim"
    """The upsamplers'."""
    eta: float = 0.0
    """Noise the decoder's `ddim` adds back, 0 to 1."""
    guidance_interval: tuple[float, float] | None = None
    """Noise levels between 0 and 1 from and to which the decoder is guided; None: all of them."""
    guidance_rescale: float = 0.0
    """How far the decoder's guided output is brought back to its contrast without guidance, 0 to 1
    (0.7 is usual)."""
    dynamic_threshold: float | None = None
    """Share of the decoder's values that stay within range, the others making it wider (0.995 is
    usual); None clamps."""
    negative_prompt: str | None = None
    """A caption that guidance leads away from, in the prior and the decoder, where it would else
    lead away from no caption."""
    best_of: int = 1
    """Pictures drawn for each one that is kept, by how close CLIP finds them to the caption."""
    size: int | None = None
    """Side to stop at, px: the decoder's or an upsampler's; None: the largest."""

    def __post_init__(self) -> None:
        if self.embed not in get_args(Embed):
            known = ", ".join(get_args(Embed))
            raise ValueError(f"embed must be one of {known}; got {self.embed!r}")
        for name in ("guidance_scale", "prior_guidance_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name} must not be negative; got {getattr(self, name)}: use 1 for no "
                    "guidance, above 1 for more of the condition"
                )
        for name in (
            "num_candidates",
            "prior_steps",
            "decoder_steps",
            "upsampler_steps",
            "best_of",
        ):
            if getattr(self, name) < 1:
                default = next(f.default for f in fields(self) if f.name == name)
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}: use {default}"
                )
        self._check_of_prior()
        if self.negative_prompt is not None:
            check_prompt(self.negative_prompt, "negative_prompt")
        _ = self.guidance_limits  # which checks its own
        for name in ("sampler", "upsampler_sampler"):
            try:
                # Whether a model can do with `analytic` is found out when it is sampled.
                make_scheduler(DiffusionConfig(eps_power=(1.0, 1.0)), getattr(self, name))
            except ValueError as error:
                raise ValueError(str(error).replace("sampler", name, 1)) from error
        if not 0 <= self.eta <= 1 or (self.eta and self.sampler != "ddim"):
            raise ValueError(
                f"eta must lie in [0, 1], and be 0 unless sampler is 'ddim'; got {self.eta} with "
                f"{self.sampler!r}: leave it out or use ddim"
            )

    def _check_of_prior(self) -> None:
        samplers = dict.fromkeys(name for kind in KINDS.values() for name in kind.samplers)
        if self.prior_sampler not in (None, *samplers):
            raise ValueError(
                f"prior_sampler must be one of {', '.join(samplers)}; got {self.prior_sampler!r}: "
                "leave it out for the prior's own"
            )
        try:
            PriorOptions(**self.of_prior)
        except ValueError as error:
            raise ValueError(as_of_prior(error)) from error

    @property
    def of_prior(self) -> dict[str, Any]:
        """The prior's, as `PriorOptions` names them."""
        return {
            "guidance_scale": self.prior_guidance_scale,
            "num_candidates": self.num_candidates,
            "sampler": self.prior_sampler,
            "num_inference_steps": self.prior_steps,
            "temperature": self.prior_temperature,
            "top_p": self.prior_top_p,
        }

    @property
    def guidance_limits(self) -> GuidanceLimits:
        """What keeps the decoder's guidance from overdoing it."""
        return GuidanceLimits(
            interval=self.guidance_interval or (0.0, 1.0),
            rescale=self.guidance_rescale,
            dynamic_threshold=self.dynamic_threshold,
        )

    @property
    def of_decoder(self) -> dict[str, Any]:
        """The decoder's, as `SamplingOptions` names them."""
        return {
            "guidance_limits": self.guidance_limits,
            "sampler": self.sampler,
            "num_inference_steps": self.decoder_steps,
            "guidance_scale": self.guidance_scale,
            "eta": self.eta,
        }

    @property
    def of_upsamplers(self) -> dict[str, Any]:
        """The upsamplers', as `SamplingOptions` names them."""
        return {
            "sampler": self.upsampler_sampler,
            "num_inference_steps": self.upsampler_steps,
        }


def as_of_prior(error: ValueError) -> str:
    """What is wrong with the prior's options, by their names in `CascadeOptions`."""
    named = {"num_inference_steps": "prior_steps", "guidance_scale": "prior_guidance_scale"}
    option, rule = str(error).split(" ", 1)
    own = option if option == "num_candidates" else named.get(option, f"prior_{option}")
    return f"{own} {rule}"


def check_prompt(prompt: object, name: str = "prompt") -> None:
    """Raise ValueError where a caption is empty or no text at all, or its weights are none."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{name} must not be empty; got {prompt!r}: describe the picture in words")
    split_weights(prompt)
