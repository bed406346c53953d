"""Folders in diffusers' layout: their networks and ours compute the same, and both ways lose
nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_parity
from diffusers import (
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from open_clip.tokenizer import bytes_to_unicode
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from unclip.clip import load_clip
from unclip.diffusion import sample
from unclip.hub import Stages, diffusers_format, load_stages
from unclip.hub.__main__ import main as hub_main
from unclip.models import DecoderConfig, UNetConfig
from unclip.pipeline import UnCLIP
from unclip.priors.text import FilledText
from unclip.stages import Conditions, DecoderStage, DecoderStageConfig, SamplingOptions

WIDTH = 32
PARTS = ("prior", "decoder", "text_proj", "super_res_first", "super_res_last", "text_encoder")


def randomise(module: Any) -> Any:
    """Every parameter random, so that none can be forgotten unnoticed."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.15 if parameter.ndim > 1 else 0.3)
        for layer in module.modules():
            if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
                layer.weight.add_(1)
    return module.eval()


def write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer over single bytes and no merges; padded with "!", number 0."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: k for k, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token="!",
        model_max_length=24,
    )
    assert tokenizer.pad_token_id == 0
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder as diffusers >= 0.38 writes it: Karlo's architecture, tiny, random."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("karlo")
    write_tokenizer(folder / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=48,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=0,
    )
    randomise(CLIPTextModelWithProjection(text_config)).save_pretrained(folder / "text_encoder")
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=24,
    )
    randomise(prior)
    with torch.no_grad():
        prior.clip_std.abs_().add_(0.5)
    prior.save_pretrained(folder / "prior")
    unet = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 32,
    }
    decoder = randomise(
        UNet2DConditionModel(
            **unet,
            sample_size=16,
            out_channels=6,
            in_channels=3,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=40,
            attention_head_dim=16,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        )
    )
    with (
        torch.no_grad()
    ):  # the variance's share lies in [-1, 1] in a trained model; exp() is told it
        decoder.conv_out.weight.mul_(0.1)
    decoder.save_pretrained(folder / "decoder")
    randomise(
        UnCLIPTextProjModel(
            clip_embeddings_dim=WIDTH, time_embed_dim=4 * 32, cross_attention_dim=40
        )
    ).save_pretrained(folder / "text_proj")
    for name in ("super_res_first", "super_res_last"):
        randomise(
            UNet2DModel(
                **unet,
                sample_size=64,
                in_channels=6,
                out_channels=3,
                down_block_types=("ResnetDownsampleBlock2D",) * 2,
                up_block_types=("ResnetUpsampleBlock2D",) * 2,
                add_attention=False,
            )
        ).save_pretrained(folder / name)
    schedulers = {
        "prior_scheduler": {"prediction_type": "sample", "clip_sample_range": 5.0},
        "decoder_scheduler": {"variance_type": "learned_range"},
        "super_res_scheduler": {},
    }
    for name, options in schedulers.items():
        UnCLIPScheduler(**options).save_pretrained(folder / name)
    write_index(folder, "diffusers")
    return folder


def write_index(folder: Path, text_proj_library: str) -> None:
    """`model_index.json` as diffusers writes it since 0.38 ("diffusers") and before ("unclip")."""
    libraries = {
        "decoder": ["diffusers", "UNet2DConditionModel"],
        "prior": ["diffusers", "PriorTransformer"],
        "super_res_first": ["diffusers", "UNet2DModel"],
        "super_res_last": ["diffusers", "UNet2DModel"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_proj": [text_proj_library, "UnCLIPTextProjModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    index = {"_class_name": "UnCLIPPipeline", "_diffusers_version": "0.38.0", **libraries}
    (folder / "model_index.json").write_text(json.dumps(index))


def test_parity_of_the_prior_with_diffusers(karlo: Path) -> None:
    theirs = PriorTransformer.from_pretrained(karlo / "prior").eval()
    ours = load_stages(karlo, only={"prior"}).prior
    text = load_clip(str(karlo)).encode_text(["a red circle", "b", ""])
    x_t, timesteps = torch.randn(3, WIDTH), torch.tensor([0, 17, 999])
    with torch.no_grad():
        expected = theirs(
            x_t, timesteps, text.text_embed, text.text_encodings, text.text_mask
        ).predicted_image_embedding
        y = ours.network(x_t, timesteps, ours.encode_context(text))
        scaled = theirs.post_process_latents(x_t)
    assert_parity("diffusers PriorTransformer", y, expected)
    torch.testing.assert_close(ours.denormalize(x_t), scaled, rtol=0, atol=1e-6)


def test_parity_of_the_decoder_with_diffusers(karlo: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(karlo / "decoder").eval()
    projection = UnCLIPTextProjModel.from_pretrained(karlo / "text_proj").eval()
    ours = load_stages(karlo, only={"decoder"}).decoder
    clip = load_clip(str(karlo))
    text, empty = clip.encode_text(["a red circle", "b"]), clip.encode_text([""])
    image_embed, x_t = torch.randn(2, WIDTH), torch.randn(2, 3, 16, 16)
    timesteps = torch.tensor([3, 900])
    everything = torch.ones(2, dtype=torch.bool)
    with torch.no_grad():
        both = [torch.cat([e.expand_as(t), t]) for e, t in zip(empty, text, strict=True)]
        states, emb = projection(
            image_embeddings=image_embed,
            prompt_embeds=both[0],
            text_encoder_hidden_states=both[1],
            do_classifier_free_guidance=True,
        )
        expected = unet(
            sample=torch.cat([x_t, x_t]),
            timestep=timesteps.repeat(2),
            encoder_hidden_states=states,
            class_labels=emb,
            attention_mask=nn.functional.pad(both[2], (4, 0), value=True),
        ).sample
        null = ours.encode_context(image_embed, text, everything, everything, empty)
        cond = ours.encode_context(image_embed, text, empty=empty)
        y = torch.cat([ours.network(x_t, timesteps, c) for c in (null, cond)])
    assert_parity("diffusers UNet2DConditionModel and UnCLIPTextProjModel", y, expected)


def test_parity_of_the_upsamplers_with_diffusers(karlo: Path) -> None:
    (ours,) = load_stages(karlo, only={"upsamplers"}).upsamplers
    x_t, low_res = torch.randn(2, 3, 64, 64), torch.rand(2, 3, 16, 16) * 2 - 1
    enlarged = nn.functional.interpolate(
        low_res, size=[64, 64], mode="bicubic", align_corners=False, antialias=True
    )
    timesteps = torch.tensor([0, 832])
    for name, network in (
        ("super_res_first", ours.network),
        ("super_res_last", ours.final_network),
    ):
        theirs = UNet2DModel.from_pretrained(karlo / name).eval()
        with torch.no_grad():
            expected = theirs(torch.cat([x_t, enlarged], 1), timesteps).sample
            y = network(x_t, timesteps, network.encode_context(low_res=low_res))
        assert_parity(f"diffusers UNet2DModel, {name}", y, expected)


Guided = Callable[[Tensor, Tensor], Tensor]


def denoise_as_diffusers(
    guided: Guided, scheduler: UnCLIPScheduler, shape: tuple[int, ...], steps: int
) -> list[Tensor]:
    """UnCLIPPipeline's loop: the input of every step, and the result."""
    generator = torch.Generator().manual_seed(7)
    scheduler.set_timesteps(steps)
    x_t = torch.randn(shape, generator=generator)
    trace = [x_t]
    for i, t in enumerate(scheduler.timesteps):
        following = scheduler.timesteps[i + 1] if i + 1 < steps else None
        x_t = scheduler.step(
            guided(x_t, t), t, x_t, generator=generator, prev_timestep=following
        ).prev_sample
        trace.append(x_t)
    return trace


def assert_same_trace(theirs: list[Tensor], ours: list[Tensor]) -> None:
    """Their scheduler multiplies alpha_bar up in fp32, and 1 - alpha_bar cancels near t = 0; ours
    does it in fp64. Over the steps that grows to 3e-3; a wrong step is off by 1.
    """
    assert len(theirs) == len(ours)
    for expected, x_t in zip(theirs, ours, strict=True):
        torch.testing.assert_close(x_t, expected, rtol=0, atol=5e-3)


@torch.no_grad()
def test_every_step_of_the_cascade_is_diffusers_own(karlo: Path) -> None:
    stages = load_stages(karlo)
    text, empty = stages.clip.encode_text(["a red circle"]), stages.clip.encode_text([""])
    both = [torch.cat(pair) for pair in zip(empty, text, strict=True)]
    dropped = torch.ones(1, dtype=torch.bool)
    steps, traces = 7, []

    def follow(_: int, __: int, x_t: Tensor, ___: Tensor) -> None:
        traces[-1].append(x_t)

    def run(network: Any, config: Any, shape: tuple[int, ...], **options: Any) -> list[Tensor]:
        traces.append([])
        generators = [torch.Generator().manual_seed(7)]
        options |= {"sampler": "ddpm", "num_inference_steps": steps, "callback": follow}
        x_0 = sample(network, config, shape, generators=generators, **options)
        return [*traces[-1], x_0]

    prior = PriorTransformer.from_pretrained(karlo / "prior").eval()

    def guided_prior(x_t: Tensor, t: Tensor) -> Tensor:
        out = prior(torch.cat([x_t, x_t]), t, *both).predicted_image_embedding
        return out[:1] + 4.0 * (out[1:] - out[:1])

    theirs = denoise_as_diffusers(
        guided_prior, UnCLIPScheduler.from_pretrained(karlo / "prior_scheduler"), (1, WIDTH), steps
    )
    ours = run(
        stages.prior.network,
        stages.prior.config.diffusion,
        (1, WIDTH),
        context=stages.prior.encode_context(text),
        null_context=stages.prior.encode_context(text, dropped, empty),
        guidance_scale=4.0,
    )
    assert_same_trace(theirs, ours)
    image_embed = prior.post_process_latents(theirs[-1])

    unet = UNet2DConditionModel.from_pretrained(karlo / "decoder").eval()
    projection = UnCLIPTextProjModel.from_pretrained(karlo / "text_proj").eval()
    states, emb = projection(
        image_embeddings=image_embed,
        prompt_embeds=both[0],
        text_encoder_hidden_states=both[1],
        do_classifier_free_guidance=True,
    )
    mask = nn.functional.pad(both[2], (4, 0), value=True)

    def guided_decoder(x_t: Tensor, t: Tensor) -> Tensor:
        out = unet(torch.cat([x_t, x_t]), t, states, class_labels=emb, attention_mask=mask).sample
        eps, variance = out.split(3, dim=1)
        return torch.cat([eps[:1] + 3.0 * (eps[1:] - eps[:1]), variance[1:]], dim=1)

    theirs = denoise_as_diffusers(
        guided_decoder,
        UnCLIPScheduler.from_pretrained(karlo / "decoder_scheduler"),
        (1, 3, 16, 16),
        steps,
    )
    ours = run(
        stages.decoder.network,
        stages.decoder.config.diffusion,
        (1, 3, 16, 16),
        context=stages.decoder.encode_context(image_embed, text, empty=empty),
        null_context=stages.decoder.encode_context(image_embed, text, dropped, dropped, empty),
        guidance_scale=3.0,
    )
    assert_same_trace(theirs, ours)

    low_res = theirs[-1].clamp(-1, 1)
    enlarged = nn.functional.interpolate(
        low_res, size=[64, 64], mode="bicubic", align_corners=False, antialias=True
    )
    first, last = (
        UNet2DModel.from_pretrained(karlo / f"super_res_{name}").eval()
        for name in ("first", "last")
    )
    theirs = denoise_as_diffusers(
        lambda x_t, t: (last if t == 0 else first)(torch.cat([x_t, enlarged], 1), t).sample,
        UnCLIPScheduler.from_pretrained(karlo / "super_res_scheduler"),
        (1, 3, 64, 64),
        steps,
    )
    traces.append([])
    options = SamplingOptions(sampler="ddpm", num_inference_steps=steps, callback=follow)
    generators = [torch.Generator().manual_seed(7)]
    x_0 = stages.upsamplers[0].sample(Conditions(low_res=low_res), generators, options)
    theirs[-1] = theirs[-1].clamp(-1, 1)
    assert_same_trace(theirs, [*traces[-1], x_0])


@pytest.mark.parametrize("library", ["diffusers", "unclip"])
def test_a_pipelines_folder_draws_pictures(karlo: Path, library: str) -> None:
    write_index(karlo, library)
    pipe = UnCLIP.from_pretrained(karlo)
    drawn = pipe(
        ["a red circle"],
        guidance_scale=8.0,
        prior_guidance_scale=4.0,
        num_candidates=1,
        prior_steps=3,
        decoder_steps=3,
        sampler="ddpm",
        upsampler_steps=3,
        progress=False,
    )
    assert {size: tuple(images.shape) for size, images in drawn.by_size.items()} == {
        16: (1, 3, 16, 16),
        64: (1, 3, 64, 64),
    }
    assert torch.isfinite(drawn.images).all()


def add_image_encoder(folder: Path, processor: str) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    encoder: CLIPVisionModelWithProjection = randomise(CLIPVisionModelWithProjection(config))
    encoder.save_pretrained(folder / "image_encoder")
    size = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder / processor)
    return encoder


@torch.no_grad()
def test_a_model_without_a_prior_draws_variations_of_a_picture(karlo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(karlo, tmp_path / "variations"))
    shutil.rmtree(folder / "prior")
    edit_json(folder / "model_index.json", _class_name="UnCLIPImageVariationPipeline")
    encoder = add_image_encoder(folder, "feature_extractor")
    pipe = UnCLIP.from_pretrained(folder)
    picture = torch.rand(1, 3, 32, 32)
    image_embed = pipe.clip.encode_image(picture * 2 - 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    expected = encoder((picture - mean) / std).image_embeds
    torch.testing.assert_close(image_embed, expected, rtol=0, atol=2e-5)
    drawn = pipe(image_embed=image_embed, decoder_steps=2, upsampler_steps=2, progress=False)
    assert drawn.images.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="has no prior, so image_embed must be given"):
        pipe("a red circle")


@torch.no_grad()
def test_a_kandinsky_prior_draws_what_diffusers_draws(karlo: Path, tmp_path: Path) -> None:
    theirs = KandinskyV22PriorPipeline(
        prior=PriorTransformer.from_pretrained(karlo / "prior"),
        image_encoder=add_image_encoder(tmp_path / "parts", "image_processor"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(karlo / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(karlo / "tokenizer"),
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log",
            prediction_type="sample",
            clip_sample_range=10.0,
        ),
        image_processor=CLIPImageProcessor.from_pretrained(tmp_path / "parts/image_processor"),
    )
    folder = tmp_path / "kandinsky"
    theirs.save_pretrained(folder)
    stages = load_stages(folder, only={"clip", "prior"})
    clip, prior = stages.clip, stages.prior
    picture = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    image_embed = theirs.image_encoder((picture - mean) / std).image_embeds
    torch.testing.assert_close(clip.encode_image(picture * 2 - 1), image_embed, rtol=0, atol=2e-5)

    x_T, steps = torch.randn(1, WIDTH), 5
    drawn = theirs(
        "a red circle",
        latents=x_T,
        generator=torch.Generator().manual_seed(7),
        guidance_scale=4.0,
        num_inference_steps=steps,
    ).image_embeds
    text, empty = clip.encode_text(["a red circle"]), clip.encode_text([""])
    everything = torch.ones(1, dtype=torch.bool)
    x_0 = sample(
        prior.network,
        prior.config.diffusion,
        (1, WIDTH),
        context=prior.encode_context(text),
        null_context=prior.encode_context(text, everything, empty),
        guidance_scale=4.0,
        sampler="ddpm",
        num_inference_steps=steps,
        generators=[torch.Generator().manual_seed(7)],
        x_T=x_T,
    )
    # Their schedule is fp32, and at t = 0 it cancels.
    torch.testing.assert_close(prior.denormalize(x_0), drawn, rtol=0, atol=3e-3)
    assert load_stages(folder, only={"prior"}).sampling["prior_guidance_scale"] == 4.0
    with pytest.raises(FileNotFoundError, match="lacks a decoder"):
        load_stages(folder)


# ------------------------------------------------------------------------------------ the way back


def states(folder: Path) -> list[dict[str, Tensor]]:
    stages = load_stages(folder)
    modules = [stages.clip, stages.prior, stages.decoder, *stages.upsamplers]
    return [module.state_dict() for module in modules]


@pytest.mark.parametrize("way", [["diffusers"], ["unclip"], ["unclip", "diffusers"]])
def test_round_trips_lose_nothing(karlo: Path, tmp_path: Path, way: list[str]) -> None:
    source = karlo
    for number, to in enumerate(way):
        target = tmp_path / str(number)
        assert hub_main(["export", str(source), "--to", to, "--out", str(target)]) == 0
        source = target
    for before, after in zip(states(karlo), states(source), strict=True):
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, msg=name)
    first, second = load_stages(karlo), load_stages(source)
    for stage in ("prior", "decoder"):
        assert getattr(first, stage).config == getattr(second, stage).config
    assert first.upsamplers[0].config == second.upsamplers[0].config


def test_exported_parts_load_in_diffusers_and_run_as_its_pipeline(
    karlo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert hub_main(["export", str(karlo), "--to", "diffusers", "--out", str(out)]) == 0
    classes = {
        "prior": PriorTransformer,
        "decoder": UNet2DConditionModel,
        "text_proj": UnCLIPTextProjModel,
        "super_res_first": UNet2DModel,
        "super_res_last": UNet2DModel,
        "prior_scheduler": UnCLIPScheduler,
        "decoder_scheduler": UnCLIPScheduler,
        "super_res_scheduler": UnCLIPScheduler,
        "text_encoder": CLIPTextModelWithProjection,
        "tokenizer": CLIPTokenizer,
    }
    parts = {name: kind.from_pretrained(out / name) for name, kind in classes.items()}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            theirs = classes[name].from_pretrained(karlo / name).state_dict()
            assert all(torch.equal(theirs[k], v) for k, v in part.state_dict().items())
    pipe = UnCLIPPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        "a red circle",
        prior_num_inference_steps=2,
        decoder_num_inference_steps=2,
        super_res_num_inference_steps=2,
        output_type="np",
    ).images
    assert images.shape == (1, 64, 64, 3)


def test_what_diffusers_cannot_be_told_is_named(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert hub_main(["export", str(tiny_model), "--to", "diffusers", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    for setting in (
        "clip: it is open_clip's",
        "prior.network.null_text 'learned' (it must be 'empty_prompt')",
        "decoder.network.unet.patch_size 2 (it must be 1)",
    ):
        assert setting in error
    assert not out.exists()


def test_embeddings_scaled_by_us_are_scaled_by_the_layers_there(tmp_path: Path) -> None:
    unet = UNetConfig(
        image_size=16,
        width=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        head_dim=16,
        context_dim=40,
    )
    network = DecoderConfig(
        unet=unet,
        image_embed_dim=WIDTH,
        text_encodings_dim=WIDTH,
        text_embed_dim=WIDTH,
        null_text="empty_prompt",
    )
    ours = randomise(DecoderStage(DecoderStageConfig(network=network)))
    diffusers_format.write(Stages(decoder=ours), tmp_path / "out")
    again = load_stages(tmp_path / "out", only={"decoder"}).decoder
    assert again.config.network.embed_scale == 1
    image_embed, timesteps = torch.randn(2, WIDTH), torch.tensor([5, 500])
    text = FilledText(torch.randn(2, WIDTH), torch.randn(2, 6, WIDTH), torch.ones(2, 6).bool())
    drop_image, x_t = torch.tensor([True, False]), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        one, other = (
            d.network(x_t, timesteps, d.encode_context(image_embed, text, drop_image))
            for d in (ours, again)
        )
    torch.testing.assert_close(other, one, rtol=0, atol=2e-5)


# ----------------------------------------------------------------------------------- bad input


def damaged(
    karlo: Path, folder: Path, part: str, change: Callable[[dict[str, Tensor]], Any]
) -> Path:
    copy = Path(shutil.copytree(karlo, folder / "copy"))
    path = copy / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return copy


def test_missing_extra_and_misshapen_tensors_are_named(karlo: Path, tmp_path: Path) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "attn1" in name]:
            del tensors[name]

    def gain(tensors: dict[str, Tensor]) -> None:
        tensors["controlnet.weight"] = torch.zeros(2)

    def bend(tensors: dict[str, Tensor]) -> None:
        tensors["conv_out.bias"] = torch.zeros(4)

    for part, stage, change, message in (
        (
            "prior",
            "prior",
            lose,
            r"lacks blocks.0.proj.bias, .* and \d+ more of .*: it is not whole",
        ),
        ("decoder", "decoder", gain, "has no place for controlnet.weight"),
        ("decoder", "decoder", bend, r"unet.conv_out.bias \[4\] for \[6\]"),
    ):
        folder = damaged(karlo, tmp_path / change.__name__, part, change)
        with pytest.raises(ValueError, match=message):
            load_stages(folder, only={stage})


def test_unset_statistics_are_refused(karlo: Path, tmp_path: Path) -> None:
    def unset(tensors: dict[str, Tensor]) -> None:
        tensors["clip_std"].zero_()

    with pytest.raises(ValueError, match="clip_mean and clip_std must be set"):
        load_stages(damaged(karlo, tmp_path, "prior", unset), only={"prior"})


def test_another_pipeline_and_another_architecture_are_refused(karlo: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(karlo, tmp_path / "other"))
    edit_json(other / "prior/config.json", added_emb_type=None)
    with pytest.raises(ValueError, match="added_emb_type must be 'prd'; got None"):
        load_stages(other, only={"prior"})
    edit_json(other / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(ValueError, match=r"must be of one of UnCLIPPipeline, .*StableDiffusion"):
        load_stages(other)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
