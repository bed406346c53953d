"""The planner: against real training steps on the shipped small configs, its sums, its command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from unclip.config import from_dict
from unclip.hub import load_clip_of
from unclip.models.glide import TextTransformer, TextTransformerConfig
from unclip.plan import GB, LiveMemory, PlanConfig, count_parameters, main, make_plan, open_stage
from unclip.stages import DecoderStage, UpsamplerStage
from unclip.training import decoder as decoders
from unclip.training import prior as priors
from unclip.training.fit import Objective
from unclip.training.prior_objectives import OBJECTIVES

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ("prior/diffusion", "prior/autoregressive", "decoder/shapes", "upsampler/shapes_256")
BATCH = 4


def batch_of(side: int) -> dict[str, Any]:
    # As long as the CLIP reads: what the planner reckons with.
    captions = ["a red circle left of a blue square " * 6] * BATCH
    return {"image": torch.rand(BATCH, 3, side, side) * 2 - 1, "caption": captions}


def objective_of(name: str) -> tuple[Callable[[], Objective], dict[str, Any]]:
    """What the training scripts train by a shipped config, and a batch for it."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if name.startswith("prior"):
        clip = load_clip_of("shapes")
        own = priors.resolve(from_dict(priors.TrainPriorConfig, values), clip)
        kind = priors.SECTIONS[own.section]

        def prior() -> Objective:
            # Of as many components as the paper's share of the width, which is what is planned for.
            truth = torch.randn(300, 80) @ torch.randn(80, clip.embed_dim)
            stage = kind.begin(getattr(own, own.section), truth, truth.flip(0))
            return OBJECTIVES[kind](stage, clip)  # type: ignore[arg-type]

        return prior, batch_of(64)
    config = from_dict(decoders.TrainDecoderConfig, values)
    if config.decoder is not None:
        clip = load_clip_of("shapes")
        config = decoders.resolve(config, clip)
        assert config.decoder is not None
        network = config.decoder
        return (
            lambda: decoders.DecoderObjective(DecoderStage(network), clip, config, {}),
            batch_of(64),
        )
    upsampler = config.upsampler
    assert upsampler is not None
    return lambda: decoders.UpsamplerObjective(UpsamplerStage(upsampler), config, {}), batch_of(64)


def train(make: Callable[[], Objective], batch: dict[str, Any], steps: int) -> None:
    objective = make()
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    ema = EMAModel(parameters)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch, torch.Generator())["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)


def measured_peak(run: Callable[[], None]) -> int:
    """Most bytes that torch's allocator had handed out at a time, by the profiler's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.filterwarnings("ignore:the caption has more than")
@pytest.mark.parametrize("name", SMALL)
def test_measured_memory_and_flops_are_the_planned_ones(name: str) -> None:
    """`pytest -s -k measured tests/test_plan.py` prints the table of docs/planning.md."""
    result = make_plan(CONFIGS / f"{name}.yaml", PlanConfig(gpus=1, micro_batch=BATCH))
    parts = result["memory"]["ddp"]
    # The CLIP and its batch are there before the measurement begins.
    planned = parts["total"] - parts["clip"]
    make, batch = objective_of(name)
    measured = measured_peak(lambda: train(make, batch, 2))
    training = result["training"]
    flops = BATCH * (training["network_flops_a_sample"] + training["clip_flops_a_sample"])
    objective = make()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(batch, torch.Generator())["loss"].backward()
    print(
        f"\n| {name} | {planned / 1e6:.1f} | {measured / 1e6:.1f} | "
        f"{100 * (planned / measured - 1):+.1f}% | {flops / 1e9:.2f} | "
        f"{counter.get_total_flops() / 1e9:.2f} | "
        f"{100 * (flops / counter.get_total_flops() - 1):+.1f}% |",
        end="",
    )
    assert planned == pytest.approx(measured, rel=0.1)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_a_storage_is_counted_once_and_while_it_lives() -> None:
    memory = LiveMemory()
    with memory:
        a = torch.ones(1000)
        views = [a.view(10, 100), a[:10], a.t()]
        assert memory.live == 4000
        b = a * 2
        assert memory.live == memory.peak == 8000
        del b
        assert memory.live == 4000
        del a, views
        assert memory.live == 0 and memory.peak == 8000


# --- the paper's sizes ----------------------------------------------------------------------------

TEXT = TextTransformerConfig(context_length=256, width=2048, depth=24)


def millions(build: Callable[[], nn.Module]) -> float:
    with torch.device("meta"):
        return count_parameters(build()) / 1e6


def paper(name: str) -> float:
    return millions(open_stage(CONFIGS / f"{name}.yaml").build)


def test_the_papers_sizes() -> None:
    """Table 3's sizes, beside those of the shipped configs; docs/planning.md has the table."""
    text = millions(lambda: TextTransformer(TEXT))
    # GLIDE, section 5: 2.3 billion for the visual part, and a text transformer of 1.2 billion.
    decoder = paper("decoder/paper")
    assert decoder == pytest.approx(2300, rel=0.05)
    assert decoder + text == pytest.approx(3500, rel=0.05)
    assert paper("upsampler/paper_256") == pytest.approx(700, rel=0.05)
    # The rest is published to one digit, and the table's own cells count otherwise: the blocks of
    # the prior alone are 12 x 2048^2 x 24 = 1.2 billion.
    assert paper("upsampler/paper_1024") == pytest.approx(282.1, abs=0.1)
    assert paper("prior/paper") == pytest.approx(1225.6, abs=0.1)
    assert paper("prior/paper_autoregressive") == pytest.approx(805.6, abs=0.1)
    assert paper("prior/paper") == pytest.approx(12 * 2048**2 * 24 / 1e6, rel=0.05)


def test_the_papers_training() -> None:
    """Table 3's settings of the loop: batch, iterations, rate, beta2, eps, decay, EMA."""
    rows = {
        "prior/paper": (4096, 600_000, 1.1e-4, 0.96, 1e-6, 6e-2, 0.9999),
        "prior/paper_autoregressive": (4096, 1_000_000, 1.6e-4, 0.91, 1e-10, 4e-2, 0.999),
        "decoder/paper": (2048, 800_000, 1.2e-4, 0.999, 1e-8, 0, 0.9999),
        "upsampler/paper_256": (1024, 1_000_000, 1.2e-4, 0.999, 1e-8, 0, 0.9999),
        "upsampler/paper_1024": (512, 1_000_000, 1.0e-4, 0.999, 1e-8, 0, 0.9999),
    }
    for name, row in rows.items():
        fit = open_stage(CONFIGS / f"{name}.yaml").config.fit
        optimizer = (fit.learning_rate, fit.betas[1], fit.adam_eps, fit.weight_decay)
        assert (fit.batch_size, fit.max_steps, *optimizer, fit.ema_decay) == row
        assert fit.betas[0] == 0.9


# --- the sums -------------------------------------------------------------------------------------


def small(tmp_path: Path, **changes: Any) -> Path:
    values = yaml.safe_load((CONFIGS / "upsampler/shapes_256.yaml").read_text())
    tiny = {"width": 16, "num_res_blocks": 1}
    values["upsampler"]["network"]["unet"] |= tiny | changes
    path = tmp_path / f"{'-'.join(changes) or 'as-it-is'}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_what_is_sharded_shrinks_with_the_gpus(tmp_path: Path) -> None:
    path = small(tmp_path)
    one, eight = (make_plan(path, PlanConfig(gpus=n, micro_batch=4)) for n in (1, 8))
    assert one["training"]["days"] == pytest.approx(8 * eight["training"]["days"])
    assert one["training"]["gpu_hours"] == pytest.approx(eight["training"]["gpu_hours"])
    weights = 4 * one["parameters"]
    for result in (one, eight):
        for parts in result["memory"].values():
            named = {k: v for k, v in parts.items() if k not in ("total", "micro_batch_that_fits")}
            assert sum(named.values()) == pytest.approx(parts["total"])
    ddp, fsdp, zero2, zero3 = (eight["memory"][k] for k in ("ddp", "fsdp", "zero2", "zero3"))
    assert (ddp["weights"], ddp["gradients"], ddp["optimizer"]) == (weights, weights, 2 * weights)
    assert (fsdp["weights"], fsdp["optimizer"]) == (weights / 8, weights / 4)
    assert zero2["weights"] == weights / 2 and zero2["gradients"] == weights / 16
    assert zero3["total"] < zero2["total"] < ddp["total"]
    assert fsdp["micro_batch_that_fits"] > ddp["micro_batch_that_fits"] > 4


def test_checkpointing_costs_flops_and_saves_memory(tmp_path: Path) -> None:
    plan = PlanConfig(gpus=1, micro_batch=4)
    kept, again = (
        make_plan(small(tmp_path), plan),
        make_plan(small(tmp_path, checkpointing=True), plan),
    )
    flops = [r["training"]["network_flops_a_sample"] for r in (kept, again)]
    assert 1.1 < flops[1] / flops[0] < 4 / 3  # all but the ends of the network once more forward
    assert again["memory"]["ddp"]["activations"] < 0.8 * kept["memory"]["ddp"]["activations"]


def test_sampling_counts_steps_and_guidance(tmp_path: Path) -> None:
    path = small(tmp_path)
    plain, more = (
        make_plan(path, PlanConfig(gpus=1, micro_batch=1, steps=n, guided=g))["sampling"]
        for n, g in ((10, False), (20, True))
    )
    assert more["flops_a_picture"] == pytest.approx(4 * plain["flops_a_picture"], rel=1e-3)
    assert (plain["network_calls"], more["network_calls"]) == (10, 40)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(small(tmp_path)), "--gpus", "4", "--gpu-memory-gb", "24", "--gpu-tflops", "71"]
    words += ["--dataset-samples", "64000", "--sample-kilobytes", "10", "--utilisation", "0.5"]
    main([*words, "--out", str(tmp_path / "new" / "plan.json")])
    result = yaml.safe_load((tmp_path / "new" / "plan.json").read_text())
    training = result["training"]
    assert result["gpu_memory_bytes"] == 24 * GB and result["micro_batch"] == 8
    assert training["samples"] == 4000 * 32 and training["epochs"] == 2
    assert training["days"] * 86400 == pytest.approx(training["flops"] / (4 * 71e12 * 0.5))
    assert training["bytes_read"] == 4000 * 32 * 10_000
    said = capsys.readouterr().out
    assert "2.00 epochs" in said and "zero3" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name a training config first"),
        (["--gpus", "2"], "name a training config first"),
        (["no-such.yaml"], "no-such.yaml"),
        (["LIST"], "must hold a training config"),
        (["TYPO"], "did you mean 'fit.max_steps'"),
        (["LINEAR"], "no plan to make"),
        (["GOOD", "--gpus", "0"], "gpus must be above 0"),
        (["GOOD", "--gpus", "7"], "multiple of gpus x gradient_accumulation_steps = 7; got 32"),
        (["GOOD", "--utilisation", "1.5"], "utilisation must lie in"),
        (["GOOD", "--gpu", "gtx"], "gpu"),
    ],
)
def test_bad_input_ends_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "typo.yaml").write_text("fit: {max_step: 3}")
    (tmp_path / "linear.yaml").write_text("linear: {}")
    paths = {name: tmp_path / f"{name.lower()}.yaml" for name in ("LIST", "TYPO", "LINEAR")}
    paths["GOOD"] = small(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([str(paths.get(word, word)) for word in words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert said in error
