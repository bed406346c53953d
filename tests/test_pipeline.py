"""The cascade: what decides a picture, what comes back, what is refused before any work."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unclip import UnCLIP
from unclip.diffusion import Resampling
from unclip.pipeline import Cancelled, CascadeOutput

FAST: dict[str, Any] = {
    "prior_steps": 3,
    "decoder_steps": 3,
    "upsampler_steps": 2,
    "progress": False,
}
PROMPTS = ["a red circle", "a blue square left of a green star"]


@pytest.fixture(scope="module")
def unclip(tiny_model: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def drawn(unclip: UnCLIP) -> CascadeOutput:
    return unclip(PROMPTS, num_images=2, seed=5, **FAST)


def test_what_comes_back(unclip: UnCLIP, drawn: CascadeOutput) -> None:
    assert unclip.sizes == [16, 64]
    assert {size: list(x.shape) for size, x in drawn.by_size.items()} == {
        16: [4, 3, 16, 16],
        64: [4, 3, 64, 64],
    }
    assert drawn.images is drawn.by_size[64]
    assert drawn.images.dtype == torch.float32 and drawn.images.abs().max() <= 1
    assert torch.allclose(drawn.image_embed.norm(dim=1), torch.ones(4))
    assert drawn.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert drawn.seeds == [5, 6, 7, 8]
    assert list(drawn.seconds) == ["text", "prior", "decoder", "upsampler_64"]
    assert all(seconds > 0 for seconds in drawn.seconds.values())


def test_a_picture_is_the_same_alone_and_in_a_batch(unclip: UnCLIP, drawn: CascadeOutput) -> None:
    alone = unclip(PROMPTS[1], seed=7, **FAST)
    torch.testing.assert_close(alone.image_embed[0], drawn.image_embed[2], atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.images[0], drawn.images[2], atol=1e-3, rtol=0)
    in_threes = unclip(PROMPTS, num_images=2, seed=5, batch_size=3, **FAST)
    torch.testing.assert_close(in_threes.images, drawn.images, atol=1e-3, rtol=0)
    assert (drawn.images[2] - drawn.images[3]).abs().max() > 0.1


def test_the_same_call_gives_the_same_bits(unclip: UnCLIP, drawn: CascadeOutput) -> None:
    assert torch.equal(unclip(PROMPTS, num_images=2, seed=5, **FAST).images, drawn.images)


def test_seeds_may_be_given_one_by_one(unclip: UnCLIP, drawn: CascadeOutput) -> None:
    given = unclip([PROMPTS[0]] * 2, seed=[6, 5], **FAST)
    torch.testing.assert_close(given.images, drawn.images[[1, 0]], atol=1e-3, rtol=0)


def first_noise(unclip: UnCLIP, stage: str, **options: Any) -> torch.Tensor:
    seen = []

    def watch(at: str, step: int, timestep: int, x_t: torch.Tensor, x_0: torch.Tensor) -> None:
        if at == stage and step == 0:
            seen.append(x_t.clone())

    unclip("a red circle", **{**FAST, **options}, callback=watch)
    return seen[0]


@pytest.mark.parametrize("stage", ["decoder", "upsampler_64"])
def test_no_stage_draws_from_another_ones_noise(unclip: UnCLIP, stage: str) -> None:
    usual = first_noise(unclip, stage)
    other = first_noise(unclip, stage, prior_steps=5, num_candidates=1, decoder_steps=2)
    assert torch.equal(usual, other)


def test_an_embedding_skips_the_prior(unclip: UnCLIP, drawn: CascadeOutput) -> None:
    output = unclip(PROMPTS[0], image_embed=drawn.image_embed[0], seed=5, **FAST)
    assert "prior" not in output.seconds
    torch.testing.assert_close(output.images[0], drawn.images[0], atol=1e-3, rtol=0)
    without_caption = unclip(image_embed=drawn.image_embed[:3], num_images=2, size=16, **FAST)
    assert without_caption.images.shape == (6, 3, 16, 16)
    assert without_caption.prompts == [None] * 6


def test_a_decoder_may_do_without_a_prior(unclip: UnCLIP, drawn: CascadeOutput) -> None:
    """Section 5.1: text_embed in the place of image_embed, or the caption alone."""
    bare = UnCLIP(unclip.clip, None, unclip.decoder, unclip.upsamplers)
    assert unclip.clip is not None
    options: dict[str, Any] = {**FAST, "seed": 5, "num_images": 2}
    text_embed = unclip.clip.encode_text(PROMPTS).text_embed
    text = bare(PROMPTS, embed="text", **options)
    given = bare(PROMPTS, image_embed=text_embed, **options)
    torch.testing.assert_close(text.images, given.images, atol=1e-3, rtol=0)
    torch.testing.assert_close(text.image_embed, text_embed.repeat_interleave(2, dim=0))
    none = bare(PROMPTS, embed="none", **options)
    assert none.image_embed is None
    # What it is told of the picture is its caption and nothing more.
    again = unclip(PROMPTS, embed="none", **{**options, "prior_steps": 1, "num_candidates": 1})
    assert torch.equal(none.images, again.images)
    pictures = [output.images for output in (drawn, text, none)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (pictures[one] - pictures[other]).abs().max() > 0.01
    # At a scale of 0 nothing at all is followed.
    off = bare(PROMPTS, embed="none", guidance_scale=0.0, **options)
    swapped = bare(PROMPTS[::-1], embed="none", guidance_scale=0.0, **options)
    torch.testing.assert_close(off.images, swapped.images, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="this model has no prior, so image_embed must be given"):
        bare(PROMPTS, **options)
    mute = UnCLIP(None, None, unclip.decoder)
    with pytest.raises(ValueError, match="embed must be 'prior' for no CLIP; got 'text'"):
        mute(PROMPTS, embed="text", **options)


def test_size_stops_early(unclip: UnCLIP, drawn: CascadeOutput) -> None:
    small = unclip(PROMPTS, num_images=2, seed=5, size=16, **FAST)
    assert list(small.by_size) == [16]
    assert torch.equal(small.images, drawn.by_size[16])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "dpm++sde", "unipc"])
def test_every_sampler_runs_in_every_stage(unclip: UnCLIP, sampler: str) -> None:
    samplers = {k: sampler for k in ("prior_sampler", "sampler", "upsampler_sampler")}
    assert torch.isfinite(unclip("a red circle", **FAST, **samplers).images).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_about_the_same(
    tiny_model: Path, drawn: CascadeOutput, dtype: torch.dtype
) -> None:
    half = UnCLIP.from_pretrained(tiny_model, dtype=dtype)
    assert half.dtype == dtype
    output = half(PROMPTS, num_images=2, seed=5, **FAST)
    assert output.images.dtype == torch.float32
    assert (output.images - drawn.images).abs().mean() < 0.1


def test_round_trip_draws_the_same(unclip: UnCLIP, drawn: CascadeOutput, tmp_path: Path) -> None:
    unclip.save_pretrained(tmp_path / "again")
    again = UnCLIP.from_pretrained(tmp_path / "again")
    assert torch.equal(again(PROMPTS, num_images=2, seed=5, **FAST).images, drawn.images)


def test_a_stage_of_another_model(tiny_model: Path, drawn: CascadeOutput, tmp_path: Path) -> None:
    changed = UnCLIP.from_pretrained(tiny_model)
    with torch.no_grad():
        changed.prior.network.out.bias += 1
    changed.save_pretrained(tmp_path / "changed")
    unclip = UnCLIP.from_pretrained(tiny_model, prior=tmp_path / "changed")
    output = unclip(PROMPTS, num_images=2, seed=5, **FAST)
    assert not torch.allclose(output.image_embed, drawn.image_embed, atol=1e-2)
    same = unclip(PROMPTS[0], image_embed=drawn.image_embed[0], seed=5, **FAST)
    torch.testing.assert_close(same.images[0], drawn.images[0], atol=1e-3, rtol=0)


def test_a_prompt_that_is_too_long_names_what_was_cut(unclip: UnCLIP) -> None:
    long = " ".join(["circle"] * 20) + " tail"
    with pytest.warns(UserWarning, match=r"more than 20 tokens; cut off: .*tail'"):
        unclip(long, size=16, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        unclip("a red", size=16, **FAST)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ""}, "prompt must not be empty; got ''"),
        ({"prompts": ["a red circle", "  "]}, "prompt must not be empty; got '  '"),
        ({"prompts": []}, "prompts must hold at least one caption"),
        ({"prompts": None}, "prompts must be given where image_embed is not"),
        ({"guidance_scale": -1.0}, "^guidance_scale must not be negative; got -1.0: use 1"),
        ({"guidance_scale": float("nan")}, "^guidance_scale must not be negative; got nan"),
        ({"prior_guidance_scale": -2.0}, "prior_guidance_scale must not be negative; got -2.0"),
        ({"sampler": "dimm"}, "^sampler must be one of .*; got 'dimm': did you mean 'ddim'"),
        ({"prior_sampler": "plms"}, "^prior_sampler must be one of ddpm, ddim"),
        ({"upsampler_sampler": "x"}, "^upsampler_sampler must be one of ddpm, ddim"),
        ({"embed": "image"}, "embed must be one of prior, text, none; got 'image'"),
        ({"prompts": None, "embed": "none"}, "embed must be 'prior' for no caption; got 'none'"),
        ({"best_of": 0}, "best_of must be at least 1; got 0: use 1"),
        ({"negative_prompt": " "}, "negative_prompt must not be empty"),
        ({"prompts": "a star::"}, "a number above 0 behind it; got '' behind 'a star'"),
        ({"prompts": "a star::-1 a cross"}, "got '-1' behind 'a star'.*a negative prompt"),
        ({"prompts": "::2 a cross"}, "a number above 0 behind it; got '2' behind ''"),
        ({"x_T": torch.zeros(3, 8, 8)}, r"x_T must be \[3, 16, 16\], or \[1, 3, 16, 16\]"),
        ({"low_res": torch.zeros(3, 32, 32)}, r"low_res must have a side among \[16\]"),
        ({"image_embed": torch.full((16,), torch.nan)}, "image_embed must be finite; got NaN"),
        ({"image": torch.zeros(3, 8, 8)}, "image must be .*, and both be given"),
        (
            {"image": torch.zeros(3, 8, 8), "repaint": torch.zeros(4, 8)},
            r"repaint must be as large as image, \[8, 8\]; got \[4, 8\]",
        ),
        (
            {
                "image": torch.zeros(3, 8, 8),
                "repaint": torch.ones(8, 8),
                "resampling": Resampling(),
                "sampler": "unipc",
            },
            "sampler must be 'ddpm' or 'ddim' for resampling; got 'unipc'",
        ),
        ({"num_images": 0}, "num_images must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"num_candidates": 0}, "num_candidates must be at least 1; got 0: use 2"),
        ({"prior_steps": 0}, "prior_steps must be at least 1; got 0: use 32"),
        ({"decoder_steps": 2000}, "^decoder_steps must be between 1 and num_train_timesteps = 10"),
        ({"upsampler_steps": 2000}, "^upsampler_steps must be between 1 and"),
        ({"eta": 2.0}, r"eta must lie in \[0, 1\]"),
        ({"eta": 0.5, "sampler": "dpm++"}, "be 0 unless sampler is 'ddim'; got 0.5 with 'dpm"),
        ({"size": 100}, "size must be one of 16, 64, the sides this model draws; got 100"),
        ({"seed": [1, 2]}, "seed must be one number, or one a picture, 1; got 2"),
        ({"image_embed": torch.zeros(3, 16)}, r"image_embed must be \[16\], or \[1, 16\]"),
        ({"image_embed": torch.zeros(8)}, r"image_embed must be \[16\]"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    unclip: UnCLIP, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(unclip, "_batch", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(ValueError, match=message):
        unclip(**{"prompts": "a red circle", **arguments}, progress=False)


# ---------------------------------------------------------------------- what a caption may be


def test_a_negative_prompt_leads_away(unclip: UnCLIP) -> None:
    """It takes the empty caption's place in guidance: at a scale of 0 it is all that is drawn."""
    options: dict[str, Any] = {**FAST, "size": 16, "guidance_scale": 3.0}
    usual = unclip(PROMPTS, **options)
    away = unclip(PROMPTS, negative_prompt="a purple cross", **options)
    assert (away.images - usual.images).abs().max() > 0.01
    torch.testing.assert_close(away.image_embed, usual.image_embed)  # the prior is not guided
    guided = unclip(PROMPTS, negative_prompt="a purple cross", prior_guidance_scale=2.0, **options)
    usual = unclip(PROMPTS, prior_guidance_scale=2.0, **options)
    assert guided.image_embed is not None and usual.image_embed is not None
    assert (guided.image_embed - usual.image_embed).abs().max() > 0.01
    only: dict[str, Any] = {"prior_guidance_scale": 0.0, "num_candidates": 1}
    negative = unclip(PROMPTS[0], negative_prompt=PROMPTS[1], **options, **only)
    drawn = unclip(PROMPTS[1], **options, num_candidates=1)
    torch.testing.assert_close(negative.image_embed, drawn.image_embed, atol=1e-4, rtol=0)
    # Without a caption too, whose one learned token stands on as many.
    embed = usual.image_embed
    assert unclip(image_embed=embed, negative_prompt="a star", **options).images.isfinite().all()


def test_weighted_prompts_are_blended(unclip: UnCLIP) -> None:
    options: dict[str, Any] = {**FAST, "size": 16, "num_candidates": 1}
    one = unclip("a red circle", **options)
    for same in ("a red circle::3", "a red circle::1 a red circle::2"):
        torch.testing.assert_close(unclip(same, **options).images, one.images, atol=1e-3, rtol=0)
    blends = unclip(["a red circle::1 a star", "a red circle::100 a star::0.01"], seed=0, **options)
    assert (blends.images[0] - one.images[0]).abs().max() > 0.01
    near = (blends.images[1] - unclip(PROMPTS[:1] * 2, **options).images[1]).abs().max()
    assert near < 0.05


def test_the_best_of_several_is_kept(unclip: UnCLIP) -> None:
    options: dict[str, Any] = {**FAST, "seed": 5}
    first, best = (unclip(PROMPTS, best_of=count, **options) for count in (1, 3))
    clip = unclip.clip
    assert clip is not None
    text = clip.encode_text(PROMPTS).text_embed
    scores = [
        F.cosine_similarity(clip.encode_image(drawn.by_size[16]), text) for drawn in (first, best)
    ]
    assert (scores[1] >= scores[0] - 1e-5).all() and (scores[1] > scores[0] + 1e-5).any()
    alone = unclip(PROMPTS[1], best_of=3, **{**options, "seed": 6})
    torch.testing.assert_close(alone.images[0], best.images[1], atol=1e-3, rtol=0)


def test_a_callback_cancels(unclip: UnCLIP) -> None:
    seen = []

    def cancel(*step: Any) -> bool:
        seen.append(step[:2])
        return step[:2] != ("decoder", 1)

    with pytest.raises(Cancelled, match="cancelled in step 2 of the decoder"):
        unclip(PROMPTS, callback=cancel, **FAST)
    assert seen[-1] == ("decoder", 1)
    assert unclip(PROMPTS, callback=lambda *_: None, **FAST).images.isfinite().all()


def test_a_cancelled_stage_goes_home(tiny_model: Path) -> None:
    offloaded = UnCLIP.from_pretrained(tiny_model, offload=True)
    home = next(offloaded.decoder.parameters()).device
    with pytest.raises(Cancelled):
        offloaded(PROMPTS[0], callback=lambda *_: False, **FAST)
    assert next(offloaded.decoder.parameters()).device == home


def test_stages_that_do_not_fit_are_refused(unclip: UnCLIP) -> None:
    with pytest.raises(ValueError, match="must take the 64 px of the stage before it"):
        UnCLIP(unclip.clip, unclip.prior, unclip.decoder, unclip.upsamplers * 2)


def test_offloaded_stages_draw_the_same(tiny_model: Path, unclip: UnCLIP) -> None:
    offloaded = UnCLIP.from_pretrained(tiny_model, offload=True)
    assert offloaded.offload_from == offloaded.device == torch.device("cpu")
    drawn, again = (m(PROMPTS[0], **FAST) for m in (unclip, offloaded))
    assert torch.equal(drawn.images, again.images)


@pytest.mark.gpu
def test_an_offloaded_stage_is_on_its_device_only_while_it_works(tiny_model: Path) -> None:
    model = UnCLIP.from_pretrained(tiny_model, device="cuda", offload=True)
    parts = {"prior": model.prior, "decoder": model.decoder, "upsampler_64": model.upsamplers[0]}

    def check(stage: str, *step: Any) -> None:
        for name, part in parts.items():
            assert part is not None
            assert next(part.parameters()).is_cuda == (name == stage)

    assert model(PROMPTS[0], callback=check, **FAST).images.isfinite().all()
    check("none")


def test_a_model_may_say_how_it_is_sampled(tiny_model: Path, tmp_path: Path) -> None:
    loaded = UnCLIP.from_pretrained(tiny_model)
    model = UnCLIP(
        loaded.clip,
        loaded.prior,
        loaded.decoder,
        loaded.upsamplers,
        sampling={"guidance_scale": 5.0, "prior_steps": 2},
    )
    model.save_pretrained(tmp_path / "model")
    again = UnCLIP.from_pretrained(tmp_path / "model")
    options = again(PROMPTS[0], **{**FAST, "prior_steps": 4}).options
    assert (options.guidance_scale, options.prior_steps) == (5.0, 4)
    with pytest.raises(ValueError, match=r"sampling must name options among .*; got guidance:"):
        UnCLIP(loaded.clip, loaded.prior, loaded.decoder, sampling={"guidance": 5.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_networks_are_loaded_in_the_dtype_asked_for(
    tiny_model: Path, dtype: torch.dtype
) -> None:
    model = UnCLIP.from_pretrained(tiny_model, dtype=dtype)
    assert model.prior is not None and model.clip is not None
    for part in (model.prior.network, model.decoder, *model.upsamplers):
        assert {parameter.dtype for parameter in part.parameters()} == {dtype}
    assert model.prior.mean.dtype == model.prior.std.dtype == torch.float32
    assert {parameter.dtype for parameter in model.clip.parameters()} == {torch.float32}
