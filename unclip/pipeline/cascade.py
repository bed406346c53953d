"""The cascade: caption -> image embedding -> 64 px -> 256 px (-> 1024 px).

Shapes: P prompts, B pictures (`num_images` for each prompt), D width of CLIP's joint space, S side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image

from unclip.clip import FrozenCLIP, Text, blend, split_weights
from unclip.diffusion import Resampling
from unclip.glide import GlideStage
from unclip.hub import Stages, check_stages, load_stages, publish, save_stages
from unclip.pipeline.checks import (
    captions_and_given,
    check_best_of,
    check_embed,
    check_inpainting,
    check_steps,
)
from unclip.pipeline.options import CascadeOptions
from unclip.pipeline.run import CascadeOutput, Run, StageCallback, picture_generators
from unclip.priors import PCA, Prior, TransformerPrior
from unclip.stages import Conditions, DecoderStage, PictureStage, SamplingOptions


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
        pca: PCA | None = None,
        offload_from: str | torch.device | None = None,
    ) -> None:
        """Put a model together.

        Args:
            clip, prior, decoder, upsamplers: stages that fit one another.
            sampling: fields of `CascadeOptions` that this model is sampled with unless a call says
                otherwise.
            pca: principal components of the CLIP's image embeddings, for those who edit with them.
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
        self.pca = pca
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
        return Stages(self.clip, self.prior, self.decoder, self.upsamplers, self.sampling, self.pca)

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
            pca=stages.pca,
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
        x_T: Tensor | None = None,
        low_res: Tensor | None = None,
        image: Tensor | None = None,
        repaint: Tensor | None = None,
        resampling: Resampling | None = None,
        batch_size: int = 8,
        progress: bool = True,
        callback: StageCallback | None = None,
        **options: Any,
    ) -> CascadeOutput:
        """Draw pictures: all of the first prompt, then all of the second, and so on.

        Args:
            prompts: captions, which may be blends of weighted ones: `a cat::2 a dog::1` (see
                `unclip.clip.split_weights`). None with an `image_embed` or `low_res`: the stages
                are given no caption.
            num_images: pictures for each prompt.
            seed: picture k has the seed `seed + k`; or a sequence of a seed for each picture. A
                picture depends on its own caption, embedding and seed alone, not on what else is
                drawn (to the last bits of rounding, which the batch's size may change), and no
                stage's noise depends on another stage's steps.
            image_embed: [D] for all prompts, or [P, D]; skips the prior.
            x_T: [3, s, s] for all prompts, or [P, 3, s, s]: the noise that the decoder starts
                from, of its own size, from `invert` for one; None draws it by the seed.
            low_res: [3, s, s] for all prompts, or [P, 3, s, s] in [-1, 1], s the side that an
                upsampler enlarges: skips the stages before it.
            image: [3, H, W] in [-1, 1], any size: a picture to paint parts of anew.
            repaint: [1, H, W] or [H, W], above 0 (white) where it is to be painted anew.
            resampling: for networks without channels for what is known (GLIDE's inpainting ones
                have them): how often they go back, for the new to fit the old; None: never.
            batch_size: pictures drawn at once.
            progress: show a bar for each stage.
            callback: called after each step with (stage, step, timestep, x_t, x_0); False from it
                cancels, and so does any exception. What was drawn is dropped.
            options: fields of `CascadeOptions`, before the model's own `sampling`.

        Raises:
            ValueError: an argument is out of its range; nothing has been drawn.
            Cancelled: the callback has returned False.
        """
        chosen = self._options(options)
        check_steps(self.stages, chosen)
        check_best_of(self.stages, chosen, prompts)
        if image_embed is None and low_res is None:
            check_embed(self.stages, chosen, prompts)
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1; got {num_images}: use 1")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}: use 8")
        check_inpainting(self.stages, image, repaint, resampling, chosen)
        captions, given = captions_and_given(
            self.stages, prompts, image_embed, x_T, low_res, num_images
        )
        count = len(captions)
        seeds = [seed + k for k in range(count)] if isinstance(seed, int) else list(seed)
        if len(seeds) != count:
            raise ValueError(
                f"seed must be one number, or one a picture, {count}; got {len(seeds)}: give one"
            )
        known = {}
        if image is not None and repaint is not None:
            known = {"image": image[None], "repaint": repaint.reshape(1, 1, *repaint.shape[-2:])}
        run = Run(chosen, progress, callback, known, resampling, seconds={})
        parts = []
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            run.title = f" {start + 1}-{min(start + batch_size, count)}/{count}"
            run.title = run.title if count > batch_size else ""
            batch_given = {name: part[rows] for name, part in given.items()}
            parts.append(self._batch(captions[rows], batch_given, seeds[rows], run))
        drawn, pictures = zip(*parts, strict=True)
        return CascadeOutput(
            by_size={size: torch.cat([p[size] for p in pictures]) for size in pictures[0]},
            image_embed=None if drawn[0] is None else torch.cat(drawn),
            prompts=captions,
            seeds=seeds,
            options=chosen,
            seconds=run.seconds,
        )

    def _batch(
        self, captions: list[str | None], given: Mapping[str, Tensor], seeds: list[int], run: Run
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Embeddings [B, D] and pictures by size of one batch."""
        options, device = run.options, self.device
        known: dict[str, Any] = {
            name: part.to(device).expand(len(seeds), -1, -1, -1) for name, part in run.known.items()
        }
        given = {name: part.to(device, torch.float32) for name, part in given.items()}
        x_T = given.get("x_T")
        conditions = self._encode(captions, run)
        conditions = replace(
            conditions,
            image_embed=given.get("image_embed"),
            low_res=given.get("low_res"),
            **known,
        )
        by_size: dict[int, Tensor] = {}
        # The weights are in `dtype` already; autocast is what casts the fp32 conditions to them.
        with self._autocast():
            if conditions.low_res is None:
                attempts = []
                for attempt in range(options.best_of):
                    # The first is the picture that is drawn where there is no choice.
                    mark = f"/{attempt}" if attempt else ""
                    attempts.append(self._decoded(conditions, x_T, seeds, run, mark))
                conditions = self._best(attempts, run)
                assert conditions.low_res is not None
                by_size[self.decoder.image_size] = conditions.low_res.float().cpu()
            for stage in self.upsamplers:
                assert conditions.low_res is not None
                if options.size is not None and stage.image_size > options.size:
                    break
                if stage.image_size <= conditions.low_res.shape[-1]:
                    continue
                images = self._drawn(stage, conditions, seeds, run)
                conditions = replace(conditions, low_res=images)
                by_size[stage.image_size] = images.float().cpu()
        embeds = conditions.image_embed
        return None if embeds is None else embeds.cpu(), by_size

    def _decoded(
        self,
        conditions: Conditions,
        x_T: Tensor | None,
        seeds: list[int],
        run: Run,
        attempt: str,
    ) -> Conditions:
        """The conditions with an image_embed, drawn if need be, and the decoder's pictures."""
        if conditions.image_embed is None and isinstance(self.decoder, DecoderStage):
            embeds = self._image_embed(conditions, seeds, run, attempt)
            conditions = replace(conditions, image_embed=embeds)
        images = self._drawn(self.decoder, conditions, seeds, run, x_T, attempt)
        return replace(conditions, low_res=images)

    def _image_embed(
        self, conditions: Conditions, seeds: list[int], run: Run, attempt: str
    ) -> Tensor | None:
        """What the decoder is given, [B, D]; None leaves it the captions alone."""
        if run.options.embed == "prior":
            return self._embeds(conditions, seeds, run, attempt)
        assert conditions.text is not None
        return conditions.text.text_embed if run.options.embed == "text" else None

    def _embeds(
        self, conditions: Conditions, seeds: list[int], run: Run, attempt: str = ""
    ) -> Tensor:
        """What the prior draws, [B, D] fp32."""
        assert self.prior is not None and conditions.text is not None
        with self.at_work(self.prior), run.timed("prior", self.device):
            embeds = self.prior.sample(
                conditions.text,
                generators=picture_generators(seeds, "prior" + attempt),
                empty=conditions.empty,
                negative=conditions.negative,
                **run.options.of_prior,
                progress=run.bar("prior"),
                callback=run.callback_of("prior"),
            )
        return embeds.float()

    def _drawn(
        self,
        stage: PictureStage,
        conditions: Conditions,
        seeds: list[int],
        run: Run,
        x_T: Tensor | None = None,
        attempt: str = "",
    ) -> Tensor:
        """What one stage draws, [B, 3, S, S]."""
        is_decoder, options = stage is self.decoder, run.options
        name = "decoder" if is_decoder else f"upsampler_{stage.image_size}"
        with self.at_work(stage), run.timed(name, self.device):
            return stage.sample(
                conditions,
                picture_generators(seeds, name + attempt),
                SamplingOptions(
                    **(options.of_decoder if is_decoder else options.of_upsamplers),
                    resampling=run.resampling,
                    progress=run.bar(name),
                    callback=run.callback_of(name),
                ),
                x_T,
            )

    def _best(self, attempts: list[Conditions], run: Run) -> Conditions:
        """Of several attempts at B pictures, each picture's best by CLIP."""
        if len(attempts) == 1 or self.clip is None:
            return attempts[0]
        text = attempts[0].text
        assert text is not None
        with self.at_work(self.clip), run.timed("choice", self.device):
            views = [
                self.clip.encode_image(attempt.low_res.float())
                for attempt in attempts
                if attempt.low_res is not None
            ]
        cosine = F.cosine_similarity(torch.stack(views), text.text_embed, dim=-1)  # [K, B]
        best, rows = cosine.argmax(0), torch.arange(cosine.shape[1], device=cosine.device)
        chosen: dict[str, Any] = {}
        for field in ("image_embed", "low_res"):
            drawn = [getattr(attempt, field) for attempt in attempts]
            if drawn[0] is not None:
                chosen[field] = torch.stack(drawn)[best, rows]
        return replace(attempts[0], **chosen)

    @torch.no_grad()
    def embed(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        progress: bool = True,
        callback: StageCallback | None = None,
        **options: Any,
    ) -> Tensor:
        """The image embeddings that the prior draws for P prompts, [P, D] fp32 on the CPU: those of
        the pictures that a call with the same arguments draws.

        Raises:
            ValueError: an argument is out of its range, or the model has no prior.
            Cancelled: the callback has returned False.
        """
        chosen = self._options(options)
        check_steps(self.stages, chosen)
        captions, _ = captions_and_given(self.stages, prompts, None, None, None, 1)
        if self.prior is None:
            raise ValueError("embed needs a prior; got a model without: load another model")
        seeds = [seed + k for k in range(len(captions))] if isinstance(seed, int) else list(seed)
        run = Run(chosen, progress, callback, {}, None, seconds={})
        with self._autocast():
            return self._embeds(self._encode(captions, run), seeds, run).cpu()

    @torch.no_grad()
    def invert(
        self,
        images: Tensor,
        *,
        image_embed: Tensor,
        prompts: str | Sequence[str] | None = None,
        num_iterations: int = 1,
        progress: bool = True,
        callback: StageCallback | None = None,
        **options: Any,
    ) -> Tensor:
        """The decoder's noise behind pictures (paper, section 3): `x_T` with which a call by the
        same embedding, prompts and options draws them again.

        Args:
            images: [B, 3, s, s] in [-1, 1], of the decoder's side.
            image_embed: [D] for all pictures, or [B, D].
            prompts: a caption for all of them, or one each; None: without.
            num_iterations: network evaluations a step; see `unclip.diffusion.invert`.
            progress, callback: as a call has them; the stage is `inversion`.
            options: fields of `CascadeOptions`: `decoder_steps`, `guidance_scale`,
                `negative_prompt`. The sampler must be `ddim` and eta 0.

        Returns:
            [B, 3, s, s] fp32 on the CPU.

        Raises:
            ValueError: an argument is out of its range, or the model has no decoder that reads an
                image_embed.
            Cancelled: the callback has returned False.
        """
        chosen = self._options(options)
        check_steps(self.stages, chosen)
        if isinstance(self.decoder, GlideStage):
            raise ValueError(
                "inversion needs a decoder that reads an image_embed; got GLIDE's, which reads "
                "captions alone: load another model"
            )
        if chosen.sampler != "ddim" or chosen.eta:
            raise ValueError(
                f"sampler must be 'ddim' and eta 0 for inversion; got {chosen.sampler!r} and "
                f"{chosen.eta}: leave them out"
            )
        embeds = image_embed.expand(len(images), -1) if image_embed.ndim == 1 else image_embed
        prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
        captions, given = captions_and_given(self.stages, prompts, embeds, None, None, 1)
        if len(captions) != len(images):
            raise ValueError(
                f"prompts and image_embed must be one for all pictures, or {len(images)}; got "
                f"{len(captions)}: give one each"
            )
        run = Run(chosen, progress, callback, {}, None, seconds={})
        with self._autocast():
            embeds = given["image_embed"].to(self.device, torch.float32)
            conditions = replace(self._encode(captions, run), image_embed=embeds)
            with self.at_work(self.decoder):
                x_T = self.decoder.invert(
                    images.to(self.device, torch.float32),
                    conditions,
                    SamplingOptions(
                        **chosen.of_decoder,
                        progress=run.bar("inversion"),
                        callback=run.callback_of("inversion"),
                    ),
                    num_iterations,
                )
        return x_T.cpu()

    def _encode(self, captions: list[str | None], run: Run) -> Conditions:
        """What CLIP says of the captions, of the negative one, and of the empty prompt where a
        stage reads it."""
        away = run.options.negative_prompt
        conditions = Conditions(captions=captions, negative_caption=away)
        if self.clip is None:
            return conditions
        prompts = [caption for caption in captions if caption is not None]
        prompts += [] if away is None else [away]
        with self.at_work(self.clip), run.timed("text", self.device):
            text = self._text(prompts) if prompts else None
            stages = [
                s
                for s in (self.prior, self.decoder)
                if isinstance(s, TransformerPrior | DecoderStage)
            ]
            reads_empty = any(s.config.network.null_text == "empty_prompt" for s in stages)
            empty = self.clip.encode_text([""]) if reads_empty else None
        negative = None
        if text is not None and away is not None:
            text, negative = text.rows(slice(-1)), text.rows(slice(-1, None))
        has_text = text is not None and len(text.text_embed) > 0
        return replace(conditions, text=text if has_text else None, empty=empty, negative=negative)

    def _text(self, prompts: Sequence[str]) -> Text:
        """The conditioning of prompts, weighted ones blended."""
        assert self.clip is not None
        parts = [split_weights(prompt) for prompt in prompts]
        text = self.clip.encode_text([caption for part in parts for caption, _ in part]).trimmed()
        if len(text.text_embed) == len(prompts):
            return text
        rows, start = [], 0
        for part in parts:
            captions = text.rows(slice(start, start := start + len(part)))
            weights = [weight for _, weight in part]
            rows.append(blend(captions, weights, self.clip.unit_norm) if part[1:] else captions)
        return Text(*map(torch.cat, zip(*rows, strict=True)))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def at_work(self, stage: nn.Module) -> Iterator[None]:
        """Within the block, one of the model's parts is where it works: offloaded ones wait
        elsewhere."""
        if self.offload_from is None:
            yield
            return
        home = next(stage.parameters()).device
        stage.to(self.offload_from)
        try:
            yield
        finally:
            stage.to(home)
