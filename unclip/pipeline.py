"""The cascade (paper, section 2): caption -> image embedding -> 64 px -> 256 px (-> 1024 px).

Shapes: P prompts, B pictures (`num_images` for each prompt), D width of CLIP's joint space, S side.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from unclip.clip import FrozenCLIP, Text
from unclip.diffusion import DiffusionConfig, make_scheduler, sampling_timesteps
from unclip.glide import GlideStage
from unclip.hub import Stages, check_stages, load_stages, publish, save_stages
from unclip.priors import KINDS, Prior, PriorOptions, TransformerPrior
from unclip.stages import Conditions, DecoderStage, PictureStage, SamplingOptions

StageCallback = Callable[[str, int, int, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class CascadeOptions:
    """How a picture is drawn; with its caption and its seed, all that decides its pixels."""

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
    size: int | None = None
    """Side to stop at, px: the decoder's or an upsampler's; None: the largest."""

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "prior_guidance_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name} must not be negative; got {getattr(self, name)}: use 1 for no "
                    "guidance, above 1 for more of the condition"
                )
        for name in ("num_candidates", "prior_steps", "decoder_steps", "upsampler_steps"):
            if getattr(self, name) < 1:
                default = next(f.default for f in fields(self) if f.name == name)
                raise ValueError(
                    f"{name} must be at least 1; got {getattr(self, name)}: use {default}"
                )
        self._check_of_prior()
        for name in ("sampler", "upsampler_sampler"):
            try:
                make_scheduler(DiffusionConfig(), getattr(self, name))
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
            raise ValueError(_as_of_prior(error)) from error

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
    def of_decoder(self) -> dict[str, Any]:
        """The decoder's, as `SamplingOptions` names them."""
        return {
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


def _as_of_prior(error: ValueError) -> str:
    """What is wrong with the prior's options, by their names in `CascadeOptions`."""
    named = {"num_inference_steps": "prior_steps", "guidance_scale": "prior_guidance_scale"}
    option, rule = str(error).split(" ", 1)
    own = option if option == "num_candidates" else named.get(option, f"prior_{option}")
    return f"{own} {rule}"


def check_prompt(prompt: object) -> None:
    """Raise ValueError where a caption is empty, or no text at all."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt must not be empty; got {prompt!r}: describe the picture in words")


class UnCLIP:
    """A CLIP, a prior, a decoder and upsamplers, run one after the other.

    GLIDE's stages read captions themselves: a decoder of that kind needs neither CLIP nor prior.

    >>> unclip = UnCLIP.from_pretrained("shapes")
    >>> images = unclip("a red circle left of a blue square", num_images=4).images
    """

    def __init__(
        self,
        clip: FrozenCLIP | None,
        prior: Prior | None,
        decoder: DecoderStage | GlideStage,
        upsamplers: Sequence[PictureStage] = (),
        *,
        sampling: Mapping[str, Any] | None = None,
        offload_from: str | torch.device | None = None,
    ) -> None:
        """Put a model together.

        Args:
            clip, prior, decoder, upsamplers: stages that fit one another.
            sampling: fields of `CascadeOptions` that this model is sampled with unless a call says
                otherwise.
            offload_from: a device on which each stage is only while it works; between, it stays
                where it is now. None: every stage works where it is.

        Raises:
            ValueError: the stages do not fit, or `sampling` names no such option.
        """
        self.clip = clip
        self.prior = prior
        self.decoder = decoder
        self.upsamplers = list(upsamplers)
        self.sampling = dict(sampling or {})
        self.offload_from = None if offload_from is None else torch.device(offload_from)
        check_stages(self.stages)
        self._options({})

    def _options(self, given: Mapping[str, Any]) -> CascadeOptions:
        known = {f.name for f in fields(CascadeOptions)}
        if unknown := set(self.sampling) - known:
            raise ValueError(
                f"sampling must name options among {', '.join(sorted(known))}; got "
                f"{', '.join(sorted(unknown))}: take them out"
            )
        return CascadeOptions(**{**self.sampling, **given})

    @property
    def stages(self) -> Stages:
        """What `unclip.hub` takes."""
        return Stages(self.clip, self.prior, self.decoder, self.upsamplers, self.sampling)

    @property
    def sizes(self) -> list[int]:
        """Sides of the pictures the stages draw, px, small to large."""
        return [self.decoder.image_size, *(up.image_size for up in self.upsamplers)]

    @property
    def device(self) -> torch.device:
        """Where the stages work."""
        return self.offload_from or next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return next(self.decoder.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "shapes",
        *,
        prior: str | Path | None = None,
        decoder: str | Path | None = None,
        upsampler: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> UnCLIP:
        """Load a model.

        Args:
            name_or_path: a shipped name, a folder (a training run's too), or
                `org/name[@revision]` on the Hub.
            prior, decoder, upsampler: models or runs whose stage takes the place of this one's;
                an upsampler brings with it those its own model puts before and after it.
            device: where to run.
            dtype: of prior, decoder and upsamplers; CLIP stays fp32.
            offload: keep the stages on the CPU and each on `device` only while it works: slower,
                in the memory of the largest stage.

        Raises:
            FileNotFoundError, ValueError: as `unclip.hub.load_stages` does.
        """
        others = {"prior": prior, "decoder": decoder, "upsamplers": upsampler}
        own = {"clip", *(stage for stage, other in others.items() if other is None)}
        home = "cpu" if offload else device
        stages = load_stages(name_or_path, device=home, dtype=dtype, only=own, optional={"prior"})
        for stage, other in others.items():
            if other is not None:
                loaded = load_stages(
                    other, device=home, dtype=dtype, only={stage}, for_clip=stages.clip
                )
                setattr(stages, stage, getattr(loaded, stage))
        assert stages.decoder is not None
        return cls(
            stages.clip,
            stages.prior,
            stages.decoder,
            stages.upsamplers,
            sampling=stages.sampling,
            offload_from=device if offload else None,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model's folder, whole or not at all; `dtype` None keeps the weights' own."""
        save_stages(self.stages, folder, dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        prompts: Sequence[str] = (),
        license: str = "apache-2.0",
        data: Sequence[str] = (),
        private: bool = False,
        dtype: torch.dtype | None = torch.float16,
        token: str | None = None,
    ) -> str:
        """Publish the model as `org/name` on the Hugging Face Hub, with a card, in one commit.

        Args:
            repo_id: the repository, made if it is not there.
            prompts: captions whose pictures the card shows.
            license, data, private, dtype, token: as `unclip.hub.publish` has them.

        Returns:
            The commit's address.

        Raises:
            ValueError, PermissionError, ConnectionError: as `unclip.hub.publish` does.
        """
        with TemporaryDirectory() as folder:
            grid = None
            if prompts:
                grid = Path(folder) / "grid.png"
                pictures = self(prompts, progress=False).images
                save_image((pictures + 1) / 2, grid, nrow=max(1, round(len(pictures) ** 0.5)))
            return publish(
                self.stages,
                repo_id,
                license=license,
                data=data,
                grid=grid,
                captions=prompts,
                private=private,
                dtype=dtype,
                token=token,
            )

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        image_embed: Tensor | None = None,
        image: Tensor | None = None,
        repaint: Tensor | None = None,
        batch_size: int = 8,
        progress: bool = True,
        callback: StageCallback | None = None,
        **options: Any,
    ) -> CascadeOutput:
        """Draw pictures: all of the first prompt, then all of the second, and so on.

        Args:
            prompts: captions. None with an `image_embed`: the decoder is given no caption.
            num_images: pictures for each prompt.
            seed: picture k has the seed `seed + k`; or a sequence of a seed for each picture. A
                picture depends on its own caption, embedding and seed alone, not on what else is
                drawn (to the last bits of rounding, which the batch's size may change), and no
                stage's noise depends on another stage's steps.
            image_embed: [D] for all prompts, or [P, D]; skips the prior.
            image: [3, H, W] in [-1, 1], any size: a picture to paint parts of anew, for models
                with an inpainting network (GLIDE's).
            repaint: [1, H, W] or [H, W], above 0 (white) where it is to be painted anew.
            batch_size: pictures drawn at once.
            progress: show a bar for each stage.
            callback: called after each step with (stage, step, timestep, x_t, x_0).
            options: fields of `CascadeOptions`, before the model's own `sampling`.

        Raises:
            ValueError: an argument is out of its range; nothing has been drawn.
        """
        chosen = self._options(options)
        self._check_steps(chosen)
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1; got {num_images}: use 1")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}: use 8")
        self._check_inpainting(image, repaint)
        captions, embeds = self._conditions(prompts, image_embed, num_images)
        count = len(captions)
        seeds = [seed + k for k in range(count)] if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise ValueError(
                f"seed must be one number, or one a picture, {count}; got {len(seeds)}: give one"
            )
        known = {}
        if image is not None and repaint is not None:
            known = {"image": image[None], "repaint": repaint.reshape(1, 1, *repaint.shape[-2:])}
        run = _Run(chosen, progress, callback, known, seconds={})
        parts = []
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            run.title = f" {start + 1}-{min(start + batch_size, count)}/{count}"
            run.title = run.title if count > batch_size else ""
            batch_embeds = None if embeds is None else embeds[rows]
            parts.append(self._batch(captions[rows], batch_embeds, seeds[rows], run))
        drawn, pictures = zip(*parts, strict=True)
        return CascadeOutput(
            by_size={size: torch.cat([p[size] for p in pictures]) for size in pictures[0]},
            image_embed=None if drawn[0] is None else torch.cat(drawn),
            prompts=captions,
            seeds=seeds,
            options=chosen,
            seconds=run.seconds,
        )

    def _check_steps(self, options: CascadeOptions) -> None:
        if self.prior is not None:
            try:
                self.prior.check_options(PriorOptions(**options.of_prior))
            except ValueError as error:
                raise ValueError(_as_of_prior(error)) from error
        schedules = {
            "decoder_steps": [self.decoder.config.diffusion],
            "upsampler_steps": [up.config.diffusion for up in self.upsamplers],
        }
        for name, configs in schedules.items():
            for config in configs:
                try:
                    sampling_timesteps(config, getattr(options, name))
                except ValueError as error:
                    message = str(error).replace("num_inference_steps", name, 1)
                    raise ValueError(message) from error
        if options.size is not None and options.size not in self.sizes:
            raise ValueError(
                f"size must be one of {', '.join(map(str, self.sizes))}, the sides this model "
                f"draws; got {options.size}: leave it out for {self.sizes[-1]}"
            )

    def _check_inpainting(self, image: Tensor | None, repaint: Tensor | None) -> None:
        if image is None and repaint is None:
            return
        if not (isinstance(self.decoder, GlideStage) and self.decoder.config.network.inpainting):
            raise ValueError(
                "image and repaint need a decoder with channels for them; got a model without: "
                "load one of GLIDE's inpainting networks, or leave them out"
            )
        shapes = [None if part is None else tuple(part.shape) for part in (image, repaint)]
        if image is None or repaint is None or image.ndim != 3 or repaint.ndim not in (2, 3):
            raise ValueError(
                "image must be [3, H, W] and repaint [1, H, W], and both be given; got "
                f"{shapes[0]} and {shapes[1]}"
            )

    def _conditions(
        self, prompts: str | Sequence[str] | None, image_embed: Tensor | None, num_images: int
    ) -> tuple[list[str | None], Tensor | None]:
        """Captions and embeddings [B, D] (None: to be drawn) of each picture."""
        if isinstance(self.decoder, GlideStage) and (prompts is None or image_embed is not None):
            raise ValueError(
                "this model's decoder reads captions alone: prompts must be given and image_embed "
                f"must not; got {'an image_embed' if prompts else 'no prompts'}"
            )
        if prompts is None and image_embed is None:
            raise ValueError("prompts must be given where image_embed is not; got neither")
        if image_embed is None and self.prior is None and isinstance(self.decoder, DecoderStage):
            raise ValueError(
                "this model has no prior, so image_embed must be given; got None: embed a picture "
                "with clip.encode_image, or load the model with prior=<a model that has one>"
            )
        given: list[str | None]
        if prompts is None:
            assert image_embed is not None
            given = [None] * (1 if image_embed.ndim == 1 else len(image_embed))
        else:
            given = [prompts] if isinstance(prompts, str) else list(prompts)
            if not given:
                raise ValueError("prompts must hold at least one caption; got none: give one")
            for prompt in given:
                check_prompt(prompt)
        captions = [prompt for prompt in given for _ in range(num_images)]
        if image_embed is None:
            return captions, None
        assert self.clip is not None
        embed = image_embed.expand(len(given), -1) if image_embed.ndim == 1 else image_embed
        if embed.shape != (len(given), self.clip.embed_dim):
            raise ValueError(
                f"image_embed must be [{self.clip.embed_dim}], or [{len(given)}, "
                f"{self.clip.embed_dim}] for {len(given)} prompts; got {list(image_embed.shape)}: "
                "use this model's own CLIP to make it"
            )
        return captions, embed.repeat_interleave(num_images, dim=0)

    def _batch(
        self, captions: list[str | None], embeds: Tensor | None, seeds: list[int], run: _Run
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Embeddings [B, D] and pictures by size of one batch."""
        options, device = run.options, self.device
        text, empty = self._encode(captions, run)
        # The weights are in `dtype` already; autocast is what casts the fp32 conditions to them.
        autocast = torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)
        with autocast:
            if embeds is None and self.prior is not None and isinstance(self.decoder, DecoderStage):
                assert text is not None
                with self._at_work(self.prior), run.timed("prior", device):
                    embeds = self.prior.sample(
                        text,
                        generators=picture_generators(seeds, "prior"),
                        empty=empty,
                        **options.of_prior,
                        progress=run.bar("prior"),
                        callback=run.callback_of("prior"),
                    )
            embeds = None if embeds is None else embeds.to(device, torch.float32)
            known = {
                name: part.to(device).expand(len(seeds), -1, -1, -1)
                for name, part in run.known.items()
            }
            conditions = Conditions(
                image_embed=embeds, text=text, empty=empty, captions=captions, **known
            )
            by_size: dict[int, Tensor] = {}
            for stage in (self.decoder, *self.upsamplers):
                if by_size and options.size is not None and stage.image_size > options.size:
                    break
                name = f"upsampler_{stage.image_size}" if by_size else "decoder"
                with self._at_work(stage), run.timed(name, device):
                    images = stage.sample(
                        conditions,
                        picture_generators(seeds, name),
                        SamplingOptions(
                            **(options.of_upsamplers if by_size else options.of_decoder),
                            progress=run.bar(name),
                            callback=run.callback_of(name),
                        ),
                    )
                conditions = replace(conditions, low_res=images)
                by_size[stage.image_size] = images.float().cpu()
        return None if embeds is None else embeds.cpu(), by_size

    def _encode(self, captions: list[str | None], run: _Run) -> tuple[Text | None, Text | None]:
        """What CLIP says of the captions, and of the empty prompt where a stage reads it."""
        prompts = [caption for caption in captions if caption is not None]
        if self.clip is None:
            return None, None
        with self._at_work(self.clip), run.timed("text", self.device):
            text = self.clip.encode_text(prompts).trimmed() if prompts else None
            stages = [
                s
                for s in (self.prior, self.decoder)
                if isinstance(s, TransformerPrior | DecoderStage)
            ]
            reads_empty = any(s.config.network.null_text == "empty_prompt" for s in stages)
            return text, self.clip.encode_text([""]) if reads_empty else None

    @contextmanager
    def _at_work(self, stage: nn.Module) -> Iterator[None]:
        """Within the block, a stage is where it works."""
        if self.offload_from is None:
            yield
            return
        home = next(stage.parameters()).device
        stage.to(self.offload_from)
        try:
            yield
        finally:
            stage.to(home)


@dataclass
class _Run:
    """What all batches of one call share."""

    options: CascadeOptions
    progress: bool
    callback: StageCallback | None
    known: dict[str, Tensor]
    seconds: dict[str, float]
    title: str = ""

    def bar(self, stage: str) -> str | None:
        return f"{stage}{self.title}" if self.progress else None

    def callback_of(self, stage: str) -> Callable[[int, int, Tensor, Tensor], None] | None:
        callback = self.callback
        return None if callback is None else lambda *step: callback(stage, *step)

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
