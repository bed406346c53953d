"""GLIDE's checkpoints: our networks, schedules, steps and tokens are its own."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_parity, liven
from safetensors import safe_open
from torch import Tensor, nn

from unclip import UnCLIP
from unclip.diffusion import DiffusionConfig, make_scheduler, sample, sampling_timesteps
from unclip.glide import GlideStage, GlideStageConfig
from unclip.hub import glide as glide_format
from unclip.hub import load_stages, trunk
from unclip.hub.__main__ import main as hub_command
from unclip.models import Glide, GlideConfig, TextTransformerConfig, UNet, UNetConfig

sys.path.insert(0, str(Path(__file__).parent / "data"))
from record_glide import CAPTIONS, STEP_SEEDS
from record_karlo import weights_of

ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "data" / "glide.safetensors"
# Larger networks than the recorded ones, 52 MB of them: not in the repository.
ORACLE = Path(
    os.environ.get("UNCLIP_GLIDE_ORACLE", ROOT.parent / "shared/oracles/glide.safetensors")
)
needs_oracle = pytest.mark.skipif(
    not ORACLE.is_file(), reason="UNCLIP_GLIDE_ORACLE names no file of numbers from GLIDE's code"
)

NETWORKS = ("base", "upsampler", "inpaint", "sr_inpaint")
ORDERS = ("gd_legacy", "gd_neworder")
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
RESPACINGS = ("100", "27", "ddim25", "fast27")


def recorded(case: str, path: Path = RECORDED) -> dict[str, Tensor]:
    """What was put into a case and came out of it."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118
        return {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}


def metadata(name: str) -> str:
    with safe_open(RECORDED, "pt") as file:
        return str(file.metadata()[name])


def answer(stage: GlideStage, known: dict[str, Tensor]) -> Tensor:
    """A network's answer to the recorded inputs."""
    conditions = {"tokens": known["tokens"], "token_mask": known["mask"]}
    if "low_res" in known:
        conditions["low_res"] = known["low_res"]
    if "inpaint_image" in known:
        conditions |= {"image": known["inpaint_image"], "keep": known["inpaint_mask"].bool()}
    with torch.no_grad():
        context = stage.network.encode_context(**conditions)
        return stage.network(known["x"], known["timesteps"], context)


@pytest.mark.parametrize("case", NETWORKS)
def test_parity_with_glide(case: str, tmp_path: Path) -> None:
    known = recorded(case)
    torch.save(weights_of(json.loads(metadata(case))), tmp_path / "x.pt")
    stage = glide_format.read_network(tmp_path / "x.pt", image_size=16, head_dim=32)
    assert_parity(f"GLIDE, {case}", answer(stage, known), known["y_out"])


@needs_oracle
@pytest.mark.parametrize("case", NETWORKS)
def test_parity_with_the_larger_glide(case: str, tmp_path: Path) -> None:
    oracle = recorded(case, ORACLE)
    weights = {k.removeprefix("sd/"): v for k, v in oracle.items() if k.startswith("sd/")}
    torch.save(weights, tmp_path / "x.pt")
    known = {k.removeprefix("in/"): v for k, v in oracle.items() if k.startswith("in/")}
    known |= {
        "timesteps": known["t"],
        "mask": known["mask"].bool(),
        "tokens": known["tokens"].long(),
    }
    size = known["x"].shape[-1]
    stage = glide_format.read_network(tmp_path / "x.pt", image_size=size, head_dim=32)
    assert_parity(f"GLIDE, {case}, larger", answer(stage, known), oracle["out/y"])


def guided_diffusion_answer(
    weights: dict[str, Tensor], known: dict[str, Tensor], new_order: bool
) -> Tensor:
    """What our trunk makes of guided-diffusion's class-conditional network."""
    labels = weights.pop("label_emb.weight")
    size = known["x"].shape[-1]
    config = trunk.config_of(weights, RECORDED, size, head_dim=32)
    unet = UNet(config).eval()
    unet.load_state_dict(trunk.from_adm(weights, config, new_attention_order=new_order))
    assert not weights  # all of them understood
    with torch.no_grad():
        emb = unet.time_embed(known["timesteps"]) + labels[known["y"]]
        return unet(known["x"], emb)


@pytest.mark.parametrize("case", ORDERS)
def test_parity_with_guided_diffusion(case: str) -> None:
    known = recorded(case)
    weights = weights_of(json.loads(metadata(case)))
    ours = guided_diffusion_answer(weights, known, case == "gd_neworder")
    assert_parity(f"guided-diffusion, {case}", ours, known["y_out"])


@needs_oracle
@pytest.mark.parametrize("case", ORDERS)
def test_parity_with_the_larger_guided_diffusion(case: str) -> None:
    oracle = recorded(case, ORACLE)
    weights = {k.removeprefix("sd/"): v for k, v in oracle.items() if k.startswith("sd/")}
    known = {k.removeprefix("in/"): v for k, v in oracle.items() if k.startswith("in/")}
    known["timesteps"] = known["t"]
    ours = guided_diffusion_answer(weights, known, case == "gd_neworder")
    assert_parity(f"guided-diffusion, {case}, larger", ours, oracle["out/y"])


def test_the_two_orders_of_guided_diffusion_differ() -> None:
    known, shapes = recorded("gd_legacy"), json.loads(metadata("gd_legacy"))
    wrong = guided_diffusion_answer(weights_of(shapes), known, new_order=True)
    assert (wrong - known["y_out"]).abs().max() > 0.1


# ---------------------------------------------------------------------------------- diffusion


def diffusion(schedule: str, respacing: str = "27") -> DiffusionConfig:
    return DiffusionConfig(
        beta_schedule=SCHEDULES[schedule],  # type: ignore[arg-type]
        prediction_type="eps",
        variance="learned_range",
        timestep_spacing="fast27" if respacing == "fast27" else "linspace",
    )


def respacings() -> Iterator[Any]:
    for schedule in SCHEDULES:
        for respacing in RESPACINGS:
            yield pytest.param(schedule, respacing, id=f"{schedule}-{respacing}")


def check_schedule(schedule: str, timesteps: Tensor, known: dict[str, Tensor]) -> None:
    scheduler = make_scheduler(diffusion(schedule), "ddpm", timesteps.flip(0).tolist())
    for name, ours in (("betas", scheduler.betas), ("alphas_cumprod", scheduler.alphas_cumprod)):
        torch.testing.assert_close(ours.double(), known[name].double(), rtol=2e-5, atol=1e-12)
    variances = [
        scheduler._get_variance(i, predicted_variance=torch.tensor(-1.0))
        for i in range(1, len(timesteps))
    ]
    theirs = known["posterior_log_variance_clipped"][1:].double()
    torch.testing.assert_close(torch.stack(variances).double(), theirs, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("schedule", "respacing"), respacings())
def test_schedules_are_glides(schedule: str, respacing: str) -> None:
    known = recorded(f"{schedule}/{respacing}")
    timesteps = known["timesteps"]
    if not respacing.startswith("ddim"):  # that stride is none of ours; its chain is as good
        config = diffusion(schedule, respacing)
        assert sampling_timesteps(config, len(timesteps)) == timesteps.flip(0).tolist()
    check_schedule(schedule, timesteps, known)


@needs_oracle
@pytest.mark.parametrize(("schedule", "respacing"), respacings())
def test_schedules_are_the_oracles(schedule: str, respacing: str) -> None:
    known = recorded(f"diffusion/{schedule}/{respacing}", ORACLE)
    known["posterior_log_variance_clipped"] = known["post_logvar"]
    check_schedule(schedule, known["timestep_map"], known)


@pytest.mark.parametrize(("schedule", "respacing"), respacings())
@pytest.mark.parametrize(("sampler", "theirs"), [("ddpm", "p_sample"), ("ddim", "ddim_sample")])
def test_steps_are_glides(schedule: str, respacing: str, sampler: str, theirs: str) -> None:
    """Every estimate of x_0 along a chain, for a network that always answers the same."""
    if respacing.startswith("ddim"):
        return
    given, known = recorded("steps"), recorded(f"{schedule}/{respacing}")
    trace: list[Tensor] = []
    sample(
        lambda x_t, timesteps, context: given["output"],
        diffusion(schedule, respacing),
        (2, 3, 4, 4),
        context={},
        sampler=sampler,
        num_inference_steps=len(known["timesteps"]),
        generators=[torch.Generator().manual_seed(seed) for seed in STEP_SEEDS],
        x_T=given["x_T"],
        callback=lambda step, timestep, x_t, x_0: trace.append(x_0),
    )
    # At the noisiest step of the cosine schedule alpha is 5e-5: rounding of eps is divided by it.
    torch.testing.assert_close(torch.stack(trace), known[theirs], atol=2e-3, rtol=0)


def oracle_base(folder: Path) -> GlideStage:
    oracle = recorded("base/sd", ORACLE)
    torch.save(oracle, folder / "base.pt")
    return glide_format.read_network(folder / "base.pt", image_size=64, head_dim=32)


@needs_oracle
def test_posterior_step_is_the_oracles() -> None:
    known = recorded("posterior", ORACLE)
    config = replace(diffusion("squaredcos_cap_v2"), prediction_type="x_0", variance="fixed_small")
    scheduler = make_scheduler(config, "ddpm", sampling_timesteps(config, 8))
    for row, index in enumerate(known["idx"].tolist()):
        x_t, x_0 = known["x"][row], known["pred_xstart"][row]
        step = scheduler.step(x_0, index, x_t, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
        mean = step.prev_sample - scheduler._get_variance(index) ** 0.5 * noise
        torch.testing.assert_close(mean, known["mean"][row], atol=2e-5, rtol=0)


@needs_oracle
def test_a_guided_ddim_run_is_the_oracles(tmp_path: Path) -> None:
    stage, known = oracle_base(tmp_path), recorded("loop/ddim", ORACLE)
    caption = {"tokens": known["tokens"][:1].long(), "token_mask": known["mask"][:1].bool()}
    with torch.no_grad():
        drawn = sample(
            stage.network,
            stage.config.diffusion,
            (1, 3, 64, 64),
            context=stage.network.encode_context(**caption),
            null_context=stage.network.null_context(**caption),
            guidance_scale=3.0,
            sampler="ddim",
            num_inference_steps=8,
            generators=[torch.Generator()],
            x_T=known["tape"][0, :1],
        )
    # Rounding grows over the eight guided steps of a random network.
    torch.testing.assert_close(drawn, known["sample"], atol=2e-3, rtol=0)


# --------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's vocabulary, as much of it as the recorded captions need."""
    folder = tmp_path_factory.mktemp("vocabulary")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text(metadata(name), encoding="utf-8")
    return folder


def tiny(context_length: int = 16, vocab_size: int = 50_257, **options: Any) -> GlideStageConfig:
    unet = UNetConfig(
        image_size=options.pop("image_size", 64),
        in_channels=options.pop("in_channels", 3),
        out_channels=6,
        width=32,
        channel_mult=(1, 1, 1, 2),
        num_res_blocks=1,
        attention_resolutions=(options.pop("attended", 8),),
        context_dim=64,
    )
    text = TextTransformerConfig(
        vocab_size=vocab_size, context_length=context_length, width=64, depth=1
    )
    return GlideStageConfig(network=GlideConfig(unet=unet, text=text, **options))


def test_tokens_are_glides(vocabulary: Path) -> None:
    config = tiny(vocab_size=10)
    stage = GlideStage(GlideStageConfig(network=config.network, tokenizer=str(vocabulary)))
    tokens, mask = stage.tokenize(CAPTIONS)
    known = recorded("tokens")
    assert torch.equal(tokens, known["tokens"])
    assert torch.equal(mask, known["mask"])
    assert not stage.tokenize([None])[1].any()


@needs_oracle
def test_tokens_are_the_oracles(vocabulary: Path) -> None:
    known = recorded("tokenizer", ORACLE)
    config = tiny(vocab_size=10, context_length=128)
    stage = GlideStage(GlideStageConfig(network=config.network, tokenizer=str(vocabulary)))
    tokens, mask = stage.tokenize([*CAPTIONS[:2], ""])
    assert torch.equal(tokens, known["tokens"].long())
    assert torch.equal(mask, known["mask"].bool())


def test_missing_vocabulary_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = tiny(vocab_size=10)
    stage = GlideStage(GlideStageConfig(network=config.network, tokenizer="nobody/nothing"))
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt.*beside GLIDE's"):
        stage.tokenize(["a corgi"])


# ------------------------------------------------------------------------------------- models


def as_glide(network: Glide) -> dict[str, Tensor]:
    """A network's weights under GLIDE's names."""
    config, ours = network.config, dict(network.state_dict())
    pairs = [(f"unet.{a}", b) for a, b in trunk.names(config.unet, "adm")]
    pairs += [(f"text.{a}", b) for a, b in trunk.transformer_names(config.text.depth)]
    pairs += [("text.token_embedding", "token_embedding"), ("text.norm_out", "final_ln")]
    pairs += [("text_to_emb", "transformer_proj")]
    theirs = trunk.take(ours, [(b, a) for a, b in pairs])
    theirs["positional_embedding"] = ours.pop("text.position_embedding")
    theirs["padding_embedding"] = ours.pop("text.padding_embedding")
    assert not ours
    return theirs


UPSAMPLER = {"in_channels": 6, "scale": 4, "image_size": 256, "attended": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    """GLIDE's files as they are published, of tiny networks; all four, and a stranger."""
    folder = tmp_path_factory.mktemp("glide")
    torch.manual_seed(0)
    for name, config in {
        "base": tiny(),
        "upsample": tiny(**UPSAMPLER),
        "base_inpaint": tiny(in_channels=7, inpainting=True),
        "upsample_inpaint": tiny(**UPSAMPLER | {"in_channels": 10, "inpainting": True}),
    }.items():
        network = Glide(config.network)
        liven(network)
        torch.save(as_glide(network), folder / f"{name}.pt")
    torch.save({"visual.conv1.weight": torch.zeros(1)}, folder / "clip_image_enc.pt")
    for path in vocabulary.iterdir():
        shutil.copy(path, folder)
    return folder


FEW: dict[str, Any] = {"decoder_steps": 2, "upsampler_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def model(folder: Path) -> UnCLIP:
    return UnCLIP.from_pretrained(folder)


def test_folder_draws_captions(model: UnCLIP) -> None:
    drawn = model(CAPTIONS[0], num_images=2, **FEW)
    assert model.clip is None and model.prior is None and drawn.image_embed is None
    assert [tuple(x.shape) for x in drawn.by_size.values()] == [(2, 3, 64, 64), (2, 3, 256, 256)]
    assert drawn.options.guidance_scale == 3.0 and drawn.options.sampler == "ddpm"
    other = model("it's 3 o'clock", **FEW)
    assert (other.images[0] - drawn.images[0]).abs().max() > 1e-3


def test_picture_alone_is_the_picture_of_a_batch(model: UnCLIP) -> None:
    both = model(CAPTIONS[:2], seed=[3, 4], size=64, **FEW)
    alone = model(CAPTIONS[1], seed=4, size=64, **FEW)
    torch.testing.assert_close(both.images[1:], alone.images, atol=1e-4, rtol=0)


def test_round_trip_through_our_own_format(model: UnCLIP, folder: Path, tmp_path: Path) -> None:
    assert hub_command(["export", str(folder), "--to", "unclip", "--out", str(tmp_path / "m")]) == 0
    config = (tmp_path / "m" / "decoder" / "config.yaml").read_text()
    assert "tokenizer: tokenizer\n" in config  # no folder of this computer
    ours = UnCLIP.from_pretrained(tmp_path / "m")
    assert ours.sampling == model.sampling
    drawn, again = (m(CAPTIONS[0], **FEW) for m in (model, ours))
    # Weights mapped from a file lie elsewhere in memory, which changes the last bits of sums.
    torch.testing.assert_close(drawn.images, again.images, atol=1e-3, rtol=0)
    assert load_stages(tmp_path / "m" / "decoder", only={"decoder"}).decoder is not None


def test_diffusers_has_no_words_for_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "m")
    assert hub_command(["export", str(folder), "--to", "diffusers", "--out", out]) == 2
    assert "GLIDE's (use --to unclip)" in capsys.readouterr().err


def test_inpainting_keeps_what_is_known(folder: Path) -> None:
    model = UnCLIP.from_pretrained(
        folder / "base_inpaint.pt", upsampler=folder / "upsample_inpaint.pt"
    )
    image = 2 * torch.rand(3, 256, 256) - 1
    repaint = torch.zeros(1, 256, 256)
    repaint[:, :, 128:] = 1
    drawn = model(CAPTIONS[0], image=image, repaint=repaint, **FEW)
    assert torch.equal(drawn.images[0, :, :, :128], image[:, :, :128])
    assert (drawn.images[0, :, :, 128:] - image[:, :, 128:]).abs().mean() > 0.1
    fresh = model(CAPTIONS[0], **FEW)  # nothing known: all of it is painted
    assert (fresh.images[0, :, :, :128] - image[:, :, :128]).abs().mean() > 0.1


def test_published_sizes_have_the_published_numbers_of_parameters() -> None:
    def count(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f}M"

    upsampler = GlideConfig(
        unet=UNetConfig(
            image_size=256,
            in_channels=6,
            out_channels=6,
            channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2,
            context_dim=512,
        ),
        scale=4,
    )
    with torch.device("meta"):
        base = Glide(GlideConfig())
        text = nn.ModuleList([base.text, base.text_to_emb])
        assert (count(base), count(text)) == ("385.0M", "76.7M")
        assert count(Glide(upsampler)) == "398.4M"


# ---------------------------------------------------------------------------------- bad input


def test_lost_weights_are_named(folder: Path, tmp_path: Path) -> None:
    weights = torch.load(folder / "base.pt")
    del weights["transformer.resblocks.0.ln_1.weight"]
    torch.save(weights, tmp_path / "base.pt")
    with pytest.raises(ValueError, match=r"base\.pt lacks text\.blocks\.0\.norm1\.weight"):
        load_stages(tmp_path / "base.pt", only={"decoder"})


def test_two_files_of_one_kind_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        shutil.copy(folder / "base.pt", tmp_path / name)
    with pytest.raises(ValueError, match=r"one base network of GLIDE's; got a\.pt and b\.pt"):
        UnCLIP.from_pretrained(tmp_path)


def test_upsampler_alone_lacks_a_decoder(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks a (clip|decoder)"):
        UnCLIP.from_pretrained(folder / "upsample.pt")


def test_an_image_embed_is_refused(model: UnCLIP) -> None:
    with pytest.raises(ValueError, match="reads captions alone"):
        model(CAPTIONS[0], image_embed=torch.zeros(16), **FEW)
    with pytest.raises(ValueError, match="got no prompts"):
        model(image_embed=torch.zeros(16), **FEW)


def test_a_plain_network_repaints_by_what_is_known(model: UnCLIP) -> None:
    image = 2 * torch.rand(3, 256, 256) - 1
    repaint = torch.zeros(1, 256, 256)
    repaint[:, :, 128:] = 1
    drawn = model(CAPTIONS[0], image=image, repaint=repaint, **FEW)
    torch.testing.assert_close(drawn.images[0, :, :, :128], image[:, :, :128])
    assert (drawn.images[0, :, :, 128:] - image[:, :, 128:]).abs().mean() > 0.1


def test_a_negative_caption_takes_the_place_of_none(model: UnCLIP) -> None:
    usual = model(CAPTIONS[0], **FEW)
    away = model(CAPTIONS[0], negative_prompt="a purple cross", **FEW)
    assert (usual.images - away.images).abs().max() > 0.01
    with pytest.raises(ValueError, match="weighted prompts need a CLIP"):
        model("a cat::2 a dog::1", **FEW)
    with pytest.raises(ValueError, match="embed must be 'prior' for GLIDE's decoder"):
        model(CAPTIONS[0], embed="none", **FEW)
    with pytest.raises(ValueError, match="best_of needs a CLIP"):
        model(CAPTIONS[0], best_of=2, **FEW)
    with pytest.raises(ValueError, match="inversion needs a decoder that reads an image_embed"):
        model.invert(torch.zeros(1, 3, 64, 64), image_embed=torch.zeros(8))
