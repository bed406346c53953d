"""The kinds of prior behind one interface: tokens, flows, closed forms, and how each trains."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import liven
from torch import Tensor

from unclip import UnCLIP
from unclip.clip import Text
from unclip.config import from_dict
from unclip.diffusion import (
    FlowConfig,
    flow_loss,
    flow_path,
    flow_times,
    make_generators,
    sample_flow,
)
from unclip.models import PriorTransformerConfig, TokenTransformer, TokenTransformerConfig
from unclip.priors import (
    KINDS,
    PCA,
    AutoregressivePrior,
    AutoregressivePriorConfig,
    DiffusionPriorConfig,
    FlowPriorConfig,
    LinearPrior,
    LinearPriorConfig,
    OneStepPriorConfig,
    Prior,
    load_prior,
)
from unclip.priors.autoregressive import pick
from unclip.priors.linear import LinearMapConfig
from unclip.training.analytic import main as measure_analytic
from unclip.training.prior import main as train_prior

SIZES: dict[str, Any] = {
    "embed_dim": 16,
    "text_encodings_dim": 32,
    "max_text_len": 20,
    "width": 32,
    "depth": 2,
    "head_dim": 16,
}
CONFIGS: dict[str, Any] = {
    "diffusion": DiffusionPriorConfig(network=PriorTransformerConfig(**SIZES)),
    "flow": FlowPriorConfig(network=PriorTransformerConfig(**SIZES)),
    "one_step": OneStepPriorConfig(network=PriorTransformerConfig(**SIZES)),
    "autoregressive": AutoregressivePriorConfig(
        network=TokenTransformerConfig(**SIZES, num_buckets=64, num_dot_buckets=8),
        explained_variance=0.9,
    ),
    "linear": LinearPriorConfig(network=LinearMapConfig(embed_dim=16)),
}


def sphere(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 16, generator=generator) + 0.3, dim=-1)


@pytest.fixture(params=CONFIGS)
def prior(request: pytest.FixtureRequest) -> Prior:
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    prior = KINDS[request.param].begin(config, sphere(200), sphere(200, seed=1))
    liven(prior.network)
    return prior.eval()


@pytest.fixture
def text() -> Text:
    """Three captions of 5, 3 and 1 tokens."""
    mask = torch.arange(5)[None] < torch.tensor([[5], [3], [1]])
    generator = torch.Generator().manual_seed(0)
    return Text(sphere(3), torch.randn(3, 5, 32, generator=generator), mask)


def draw(prior: Prior, text: Text, rows: list[int], **options: Any) -> Tensor:
    generators = make_generators(7, 3)
    given = {"num_inference_steps": 3, **options}
    return prior.sample(text.rows(rows), generators=[generators[r] for r in rows], **given)


# --------------------------------------------------------------------------- one interface


def test_saving_and_loading_changes_no_sample(prior: Prior, text: Text, tmp_path: Path) -> None:
    before = draw(prior, text, [0, 1, 2])
    assert before.shape == (3, 16)
    torch.testing.assert_close(before.norm(dim=1), torch.ones(3))
    prior.save(tmp_path / "prior")
    loaded = load_prior(tmp_path / "prior")
    assert type(loaded) is type(prior) and loaded.config == prior.config
    assert torch.equal(draw(loaded, text, [0, 1, 2]), before)


def test_half_precision_keeps_the_statistics(prior: Prior, text: Text, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior")
    loaded = load_prior(tmp_path / "prior", torch.bfloat16)
    for name in prior.statistics:
        buffer = loaded.get_buffer(name)
        assert buffer.dtype == torch.float32 and torch.equal(buffer, prior.get_buffer(name))
    with torch.autocast("cpu", torch.bfloat16):
        drawn = draw(loaded, text, [0, 1, 2])
    # The token of an autoregressive prior may tip over, and what follows with it.
    if not isinstance(prior, AutoregressivePrior):
        assert F.cosine_similarity(drawn, draw(prior, text, [0, 1, 2])).min() > 0.98


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_an_embedding_is_the_same_alone_and_in_a_batch(
    prior: Prior, text: Text, guidance_scale: float
) -> None:
    options = {"guidance_scale": guidance_scale, "num_candidates": 3}
    together = draw(prior, text, [0, 1, 2], **options)
    for row in range(3):
        alone = draw(prior, text, [row], **options)
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=0)


def test_guidance_moves_what_reads_captions(prior: Prior, text: Text) -> None:
    plain = draw(prior, text, [0, 1, 2])
    moved = (draw(prior, text, [0, 1, 2], guidance_scale=4.0) - plain).abs().max()
    assert (moved > 1e-3) == (not isinstance(prior, LinearPrior))


def test_options_out_of_range(prior: Prior, text: Text) -> None:
    for options, said in (
        ({"num_candidates": 0}, "num_candidates must be at least 1; got 0"),
        ({"temperature": 0.0}, r"temperature must be above 0; got 0\.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\]; got 1\.5"),
        ({"guidance_scale": -1.0}, "guidance_scale must not be negative"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
    ):
        with pytest.raises(ValueError, match=said):
            draw(prior, text, [0], **options)
    if prior.samplers:
        with pytest.raises(ValueError, match=f"for a prior of kind {prior.kind}; got 'plms'"):
            draw(prior, text, [0], sampler="plms")


def test_an_unknown_kind_is_refused(prior: Prior, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior")
    config = tmp_path / "prior/config.yaml"
    config.write_text(config.read_text().replace(f"kind: {prior.kind}", "kind: psychic"))
    with pytest.raises(ValueError, match="kind 'psychic', which must be one of diffusion, "):
        load_prior(tmp_path / "prior")


@pytest.mark.filterwarnings("ignore:the caption has more than")
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_kind_trains_and_draws_pictures(
    kind: str,
    tmp_path: Path,
    tiny_model: Path,
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = "prior" if kind == "diffusion" else kind
    config = tmp_path / "config.yaml"
    sizes = {name: SIZES[name] for name in ("width", "depth", "head_dim")}
    lines = {
        "linear": "{num_samples: 10}",
        "autoregressive": f"{{network: {sizes}, explained_variance: 0.9}}".replace("'", ""),
    }
    own = lines.get(kind, f"{{network: {sizes}}}".replace("'", ""))
    config.write_text(f"run: {tmp_path / 'run'}\n{section}: {own}\n")
    common = ["--config", str(config), "--base", str(tiny_model), "--num-workers", "0"]
    data = ["--data", str(pictures)]
    if kind == "autoregressive":  # principal components need more embeddings than dimensions
        with pytest.raises(SystemExit):
            train_prior([*common, *data, "--batch-size", "2"])
        assert "more embeddings than their width, 16; got 10" in capsys.readouterr().err
        data = ["--data", "shapes", "--statistics-samples", "64"]
    train_prior([*common, *data, "--batch-size", "2", "--max-steps", "2"])
    model = UnCLIP.from_pretrained(tmp_path / "run")
    assert model.prior is not None and model.prior.kind == kind
    drawn = model(["a red circle"], prior_steps=2, decoder_steps=1, size=16, progress=False)
    assert drawn.image_embed is not None and drawn.image_embed.isfinite().all()


def test_one_kind_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*flags: str) -> str:
        with pytest.raises(SystemExit):
            train_prior(["--run", str(tmp_path / "run"), *flags])
        return capsys.readouterr().err

    two = said("--flow.network.depth", "2", "--one_step.network.depth", "2")
    assert "must be set at the most; got one_step and flow: train one kind" in two
    assert "init must be left out with linear" in said("--linear.ridge", "0.1", "--init", "shapes")


# --------------------------------------------------------------------------- flow


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("prediction_type", ["v", "x_0"])
def test_a_straight_flow_arrives_in_one_step(sampler: str, prediction_type: Any) -> None:
    """Where all data are one point c the velocity is (x_t - c) / t, and the path straight."""
    point = torch.randn(3, 4)

    def network(x_t: Tensor, timesteps: Tensor, context: Any) -> Tensor:
        return point if prediction_type == "x_0" else (x_t - point) / (timesteps[:, None] / 1000)

    context = {"none": torch.zeros(3)}
    for steps in (1, 5):
        drawn = sample_flow(
            network,
            FlowConfig(prediction_type=prediction_type),
            (3, 4),
            context=context,
            sampler=sampler,
            num_inference_steps=steps,
            generators=make_generators(0, 3),
        )
        torch.testing.assert_close(drawn, point, atol=1e-5, rtol=0)


def test_heun_follows_a_curved_flow_closer_than_euler() -> None:
    """Data N(0, s^2): the velocity is linear in x_t, and the flow maps noise z to s z exactly."""
    std = 0.3

    def network(x_t: Tensor, timesteps: Tensor, context: Any) -> Tensor:
        t = timesteps[:, None] / 1000
        variance = (1 - t) ** 2 * std**2 + t**2
        return x_t * (t - (1 - t) * std**2) / variance

    noise = torch.cat([torch.randn(1, 8, generator=g) for g in make_generators(0, 16)])
    error = {}
    for sampler in ("euler", "heun"):
        drawn = sample_flow(
            network,
            FlowConfig(prediction_type="v"),
            (16, 8),
            context={"none": torch.zeros(16)},
            sampler=sampler,
            num_inference_steps=20,
            generators=make_generators(0, 16),
        )
        error[sampler] = (drawn - std * noise).abs().max().item()
    assert error["heun"] < 0.02 < error["euler"] / 2


def test_the_loss_is_the_velocitys_whatever_is_predicted() -> None:
    x_0, noise, wrong = torch.randn(3, 4, 5)
    t = torch.tensor([0.01, 0.2, 0.6, 1.0])
    x_t, v = flow_path(x_0, noise, t)
    as_v, as_x_0 = FlowConfig(prediction_type="v"), FlowConfig(prediction_type="x_0")
    losses, estimate = flow_loss(as_x_0, wrong, x_0, noise, t)
    torch.testing.assert_close(estimate, wrong)
    same, back = flow_loss(as_v, (x_t - wrong) / t[:, None], x_0, noise, t)
    torch.testing.assert_close(back, wrong, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(losses[1:], same[1:])
    assert losses[0] < same[0] / 20  # next to t = 0 an error of x_0 would outweigh all others
    assert flow_loss(as_v, v, x_0, noise, t)[0].max() < 1e-10
    assert flow_loss(as_x_0, x_0, x_0, noise, t)[0].max() == 0


def test_a_flow_that_was_saved_without_the_choice_predicts_velocities() -> None:
    """Such priors were trained on them; read as x_0 they would draw something else, unsaid."""
    assert from_dict(FlowConfig, {"time_distribution": "uniform"}).prediction_type == "v"


def test_the_path_runs_from_data_to_noise() -> None:
    x_0, noise = torch.randn(2, 3), torch.randn(2, 3)
    x_t, v = flow_path(x_0, noise, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(x_t, torch.stack([x_0[0], noise[1]]))
    torch.testing.assert_close(v, noise - x_0)
    u = torch.linspace(0.05, 0.95, 19)
    assert torch.equal(flow_times(FlowConfig(), u), u)
    middle = flow_times(FlowConfig(time_distribution="logit_normal"), u)
    assert middle.diff().min() > 0 and middle[9] == pytest.approx(0.5)
    assert (middle - 0.5).abs().mean() < (u - 0.5).abs().mean()
    with pytest.raises(ValueError, match=r"flow\.time_distribution must be one of"):
        FlowConfig(time_distribution="cauchy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"flow\.prediction_type must be one of x_0, v; got 'eps'"):
        FlowConfig(prediction_type="eps")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- linear, PCA


def test_ridge_regression_finds_a_linear_map() -> None:
    text_embed = sphere(300)
    map_ = torch.randn(16, 16)
    image_embed = text_embed @ map_.T + 0.5
    config = LinearPriorConfig(network=LinearMapConfig(embed_dim=16), ridge=0, unit_norm=False)
    prior = LinearPrior.begin(config, image_embed, text_embed)
    drawn = prior.denormalize(prior.network(text_embed))
    torch.testing.assert_close(drawn, image_embed, atol=1e-3, rtol=0)
    heavy = LinearPrior.begin(
        LinearPriorConfig(network=LinearMapConfig(embed_dim=16), ridge=1e6, unit_norm=False),
        image_embed,
        text_embed,
    )
    mean = image_embed.mean(0).expand(300, -1)
    torch.testing.assert_close(
        heavy.denormalize(heavy.network(text_embed)), mean, atol=1e-2, rtol=0
    )


def test_principal_components_are_ordered_and_complete() -> None:
    scale = torch.linspace(3, 0.1, 16)
    z = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * scale
    turn = torch.linalg.qr(torch.randn(16, 16)).Q
    pca = PCA.fit(z @ turn + 1)
    assert (pca.variance.diff() <= 0).all()
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(16), atol=1e-5, rtol=0)
    errors = [(pca.reconstruct(z @ turn + 1, k) - z @ turn - 1).square().mean() for k in (1, 8, 16)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8
    kept = pca.num_components(0.9)
    share = pca.variance.cumsum(0) / pca.variance.sum()
    assert share[kept - 1] >= 0.9 > share[kept - 2]
    assert pca.num_components(1.0) == 16
    with pytest.raises(ValueError, match="components must lie between 1 and 16"):
        pca.reconstruct(z, 17)
    with pytest.raises(ValueError, match="explained must lie in"):
        pca.num_components(0)
    with pytest.raises(ValueError, match="more embeddings than their width, 16; got 16"):
        PCA.fit(z[:16])


# --------------------------------------------------------------------------- autoregressive


@pytest.fixture
def tokens_prior() -> AutoregressivePrior:
    torch.manual_seed(0)
    prior = AutoregressivePrior.begin(CONFIGS["autoregressive"], sphere(400), sphere(400, seed=1))
    liven(prior.network)
    return prior.eval()


def test_tokens_stand_for_embeddings_to_half_a_bucket(tokens_prior: AutoregressivePrior) -> None:
    z = sphere(400)
    tokens = tokens_prior.quantize(z)
    kept = tokens_prior.num_components
    assert tokens.shape == (400, kept) and 10 < kept < 16
    assert tokens.min() == 0 and tokens.max() == 63
    back = tokens_prior.pca.project(
        tokens_prior.pca.embed(
            tokens_prior.low[:kept]
            + (tokens + 0.5) / 64 * (tokens_prior.high - tokens_prior.low)[:kept]
        )
    )[:, :kept]
    error = (back - tokens_prior.pca.project(z)[:, :kept]).abs()
    assert (error <= (tokens_prior.high - tokens_prior.low)[:kept] / 128 + 1e-6).all()
    assert F.cosine_similarity(tokens_prior.dequantize(tokens), z).mean() > 0.9
    far = tokens_prior.quantize(10 * z)  # beyond training's range: the last bucket, no error
    assert far.min() >= 0 and far.max() <= 63


def test_dot_tokens_come_equally_often(tokens_prior: AutoregressivePrior) -> None:
    dot = tokens_prior.quantize_dot(sphere(400), sphere(400, seed=1))
    assert (dot.bincount(minlength=8) - 50).abs().max() <= 1
    products = (sphere(400) * sphere(400, seed=1)).sum(1)
    assert products[dot == 7].min() >= products[dot == 6].max()


def test_one_token_at_a_time_equals_all_at_once(text: Text) -> None:
    torch.manual_seed(0)
    network = TokenTransformer(
        TokenTransformerConfig(**SIZES, num_components=6, num_buckets=32, num_dot_buckets=4)
    ).eval()
    liven(network)
    context = network.encode_context(
        text_embed=text.text_embed, text_encodings=text.text_encodings, text_mask=text.text_mask
    )
    dot, tokens = torch.tensor([0, 3, 4]), torch.randint(32, (3, 6))
    at_once = network(dot, tokens, context)
    past, last = None, dot
    for k in range(6):
        logits, past = network.step(last, context, past)
        torch.testing.assert_close(logits, at_once[:, k], atol=1e-5, rtol=0)
        last = tokens[:, k]
    # A token is blind to itself and to those after it.
    changed = network(dot, torch.cat([tokens[:, :3], 31 - tokens[:, 3:]], dim=1), context)
    torch.testing.assert_close(changed[:, :4], at_once[:, :4])
    assert (changed[:, 4:] - at_once[:, 4:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="must lie between 1 and embed_dim, 16; got 17"):
        TokenTransformerConfig(**SIZES, num_components=17)


def test_picking_follows_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(4000, 4)
    chances = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    shares = pick(logits, chances, 1.0, 1.0).bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.4, 0.2, 0.3]), atol=0.03, rtol=0)
    nucleus = pick(logits, chances, 1.0, 0.65).bincount(minlength=4) / 4000
    torch.testing.assert_close(nucleus, torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.03, rtol=0)
    assert (pick(logits, chances, 1.0, 1e-6) == 1).all()
    cold = pick(logits, chances, 0.1, 1.0)
    assert (cold == 1).float().mean() > 0.9


def test_only_the_top_of_the_dot_products_is_asked_for(
    tokens_prior: AutoregressivePrior, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    step = tokens_prior.network.step

    def watched(last: Tensor, context: Any, past: Any) -> Any:
        if past is None:
            seen.append(last)
        return step(last, context, past)

    monkeypatch.setattr(tokens_prior.network, "step", watched)
    for _ in range(3):
        draw(tokens_prior, text, [0, 1, 2], num_candidates=20)
    assert torch.cat(seen).unique().tolist() == [4, 5, 6, 7]
    seen.clear()
    draw(tokens_prior, text, [0], guidance_scale=2.0)
    assert seen[0][:2].tolist() == [8, 8]  # the unconditional half hears of no dot product


# --------------------------------------------------------------------------- analytic variance


@pytest.mark.filterwarnings("ignore:the caption has more than")
def test_the_analytic_sampler_wants_a_measurement_and_takes_it(
    tiny_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    options = {"prior_steps": 3, "prior_sampler": "analytic", "decoder_steps": 1, "size": 16}
    with pytest.raises(ValueError, match=r"^prior_sampler must not be 'analytic' for a model"):
        UnCLIP.from_pretrained(folder)(["a red circle"], progress=False, **options)
    weights = (folder / "prior/model.safetensors").read_bytes()
    measure_analytic(["--model", str(folder), "--data", str(pictures), "--num", "8"])
    assert "from t = 0 to T - 1:" in capsys.readouterr().out
    assert (folder / "prior/model.safetensors").read_bytes() == weights
    model = UnCLIP.from_pretrained(folder)
    assert model.prior is not None
    power = model.prior.config.diffusion.eps_power
    assert len(power) == 32 and all(0 <= value <= 1 for value in power)
    analytic = model(["a red circle"], progress=False, **options).image_embed
    ddpm = model(["a red circle"], progress=False, **{**options, "prior_sampler": "ddpm"})
    assert analytic is not None and analytic.isfinite().all()
    assert ddpm.image_embed is not None and not torch.equal(analytic, ddpm.image_embed)
    with pytest.raises(SystemExit):
        measure_analytic(["--model", str(tmp_path)])
    assert "model must be a folder with a prior" in capsys.readouterr().err
