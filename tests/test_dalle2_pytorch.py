"""Priors of DALLE2-pytorch: agreement with numbers that the original recorded (see
`data/record_dalle2_pytorch.py`), and every container its checkpoints come in."""

import json
import os
import sys
import types
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import assert_parity
from packaging.version import Version
from safetensors import safe_open
from torch import Tensor

from unclip.clip import Text
from unclip.diffusion import alpha_bars, make_generators
from unclip.hub import load_stages
from unclip.hub.dalle2_pytorch import load_dalle2_pytorch_prior
from unclip.models import MultiQueryPrior, MultiQueryPriorConfig
from unclip.priors import DiffusionPrior, MultiQueryDiffusionPriorConfig, load_prior

DATA = Path(__file__).parent / "data"
TOLERANCE = 2e-5
GUIDANCE_SCALE = 1.5
CASES = {
    "0.15.4": ("released", "other"),
    "1.0.3": ("released", "other"),
    "1.8.4": ("released", "other"),
    "1.10.3": ("released", "other"),
    "1.15.6": ("released", "other", "self_cond", "v", "eps"),
}
NO_GUIDANCE = ("1.0.3", "1.8.4")
every_case = pytest.mark.parametrize(
    ("version", "case"), [(version, case) for version, cases in CASES.items() for case in cases]
)

Recorded = dict[str, Any]


def recorded(version: str, case: str) -> Recorded:
    """One case's tensors by name, its `state` dict, and its `config`."""
    with safe_open(DATA / f"dalle2_pytorch_{version}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["cases"])[case]
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118
        tensors = {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    if version == "0.15.4":  # it pads nothing: what its captions are long, the CLIP says
        config["prior"]["net"]["max_text_len"] = tensors["text_encodings"].shape[1]
    return {**tensors, "state": state, "config": config}


def write(
    folder: Path, case: Recorded, container: dict[str, Any] | None = None, config: Any = ...
) -> Path:
    """A checkpoint's folder as DALLE2-pytorch leaves it; by default a bare state dict."""
    folder.mkdir(exist_ok=True)
    torch.save(case["state"] if container is None else container, folder / "prior.pth")
    if config is not None:
        config = case["config"] if config is ... else config
        (folder / "prior_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, version: str, case: Recorded) -> DiffusionPrior:
    return load_dalle2_pytorch_prior(write(folder, case), version=version)


def text_of(case: Recorded) -> Text:
    return Text(case["text_embed"], case["text_encodings"], case["text_mask"])


def conditions(case: Recorded) -> dict[str, Tensor]:
    return {name: case[name] for name in ("text_embed", "text_encodings", "text_mask")}


@torch.no_grad()
def predict(prior: DiffusionPrior, case: Recorded, context: Any) -> Tensor:
    more = (case["self_cond"],) if "self_cond" in case else ()
    return prior.network(case["x_t"], case["timesteps"], context, *more)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------- the recorded numbers


@every_case
def test_parity_of_the_network_with_the_original(tmp_path: Path, version: str, case: str) -> None:
    told = recorded(version, case)
    prior = load(tmp_path, version, told)
    context = prior.network.encode_context(**conditions(told))
    output = predict(prior, told, context)
    assert_parity(f"DALLE2-pytorch {version}, {case}", output, told["output"])
    if version in NO_GUIDANCE:
        # The original's unconditional pass is the conditional one: its guidance does nothing.
        assert torch.equal(told["output_null"], told["output"])
        return
    null = predict(prior, told, prior.network.null_context(**conditions(told)))
    close(null, told["output_null"])
    close(null + GUIDANCE_SCALE * (output - null), told["output_guided"])


@every_case
def test_the_noise_schedule_agrees_with_the_original(
    tmp_path: Path, version: str, case: str
) -> None:
    told = recorded(version, case)
    prior = load(tmp_path, version, told)
    ours = alpha_bars(prior.config.diffusion).float()
    torch.testing.assert_close(ours, told["alpha_bars"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sample", "sample_guided"])
@every_case
def test_sampling_agrees_with_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, case: str, name: str
) -> None:
    told = recorded(version, case)
    prior = load(tmp_path, version, told)
    noise: Iterator[Tensor] = iter(told[f"{name}_noise"])
    for module in ("unclip.diffusion.sampling", "diffusers.schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **options: next(noise))
    steps = prior.config.diffusion.num_train_timesteps
    options: dict[str, Any] = {"num_candidates": 1, "sampler": "ddpm", "num_inference_steps": steps}
    options |= {"generators": make_generators(0, 3)}
    options |= {"guidance_scale": GUIDANCE_SCALE if name == "sample_guided" else 1.0}
    if name == "sample_guided" and version in NO_GUIDANCE:
        with pytest.raises(ValueError, match=r"not trained with a null .* use guidance_scale=1"):
            prior.sample(text_of(told), **options)
        return
    close(prior.sample(text_of(told), **options), told[name])


@every_case
def test_padding_is_not_read(tmp_path: Path, version: str, case: str) -> None:
    told = recorded(version, case)
    prior = load(tmp_path, version, told)
    garbage = torch.where(told["text_mask"][..., None], told["text_encodings"], torch.tensor(7.0))
    changed = conditions(told) | {"text_encodings": garbage}
    close(predict(prior, told, prior.network.encode_context(**changed)), told["output"])
    row = 1  # cut to its own four tokens
    alone = {k: v[row : row + 1] for k, v in conditions(told).items()}
    for key in ("text_encodings", "text_mask"):
        alone[key] = alone[key][:, :4]
    one = {k: told[k][row : row + 1] for k in ("x_t", "timesteps", "self_cond") if k in told}
    output = predict(prior, one, prior.network.encode_context(**alone))
    close(output, told["output"][row : row + 1])


@every_case
def test_saving_and_loading_changes_nothing(tmp_path: Path, version: str, case: str) -> None:
    told = recorded(version, case)
    prior = load(tmp_path, version, told)
    prior.save(tmp_path / "prior")
    loaded = load_prior(tmp_path / "prior")
    assert loaded.config == prior.config
    assert torch.equal(loaded.mean, prior.mean) and torch.equal(loaded.std, prior.std)
    context = loaded.network.encode_context(**conditions(told))
    close(predict(loaded, told, context), told["output"])
    kind = yaml.safe_load((tmp_path / "prior/config.yaml").read_text())["kind"]
    assert kind == "multi_query_diffusion"


def test_a_version_taken_for_another_gives_other_numbers(tmp_path: Path) -> None:
    """Old weights fit the newer code, name by name, and mean something else there."""
    told = recorded("1.0.3", "released")
    prior = load(tmp_path, "1.8.4", told)
    output = predict(prior, told, prior.network.encode_context(**conditions(told)))
    assert (output - told["output"]).norm() > 0.05 * told["output"].norm()


def test_embeddings_are_scaled_as_the_original_does(tmp_path: Path) -> None:
    told = recorded("1.15.6", "released")
    prior = load(tmp_path, "1.15.6", told)
    embed = F.normalize(torch.randn(4, 24), dim=-1)
    torch.testing.assert_close(prior.normalize(embed), embed * 24**0.5)
    torch.testing.assert_close(prior.denormalize(embed), embed / 24**0.5)
    told["config"]["prior"]["image_embed_scale"] = 3.0
    prior = load(tmp_path, "1.15.6", told)
    torch.testing.assert_close(prior.normalize(embed), embed * 3)


# ---------------------------------------------------------------------------------- containers


@pytest.fixture
def original_classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Classes that the original's files name, by the names they have there; loading must not ask
    for them, so they are only here."""

    class Version:  # of packaging to 25
        def __init__(self, release: tuple[int, ...]) -> None:
            self._version = _Version(0, release, None, None, None, None)
            self._key = (0, release, InfinityType(), NegativeInfinityType(), InfinityType())

    class SlotVersion:  # of packaging 26.0
        __slots__ = ("_epoch", "_release")

        def __init__(self, release: tuple[int, ...]) -> None:
            self._epoch, self._release = 0, release

    class InfinityType: ...

    class NegativeInfinityType: ...

    class LinearWarmup:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.last_step = optimizer, 3

    _Version = namedtuple("_Version", "epoch release dev pre post local")
    homes = {Version: "packaging.version", SlotVersion: "packaging.version"}
    homes |= {_Version: "packaging.version", LinearWarmup: "pytorch_warmup.base"}
    homes |= dict.fromkeys((InfinityType, NegativeInfinityType), "packaging._structures")
    for home in {"pytorch_warmup", *homes.values()}:
        monkeypatch.setitem(sys.modules, home, types.ModuleType(home))
    for cls, home in homes.items():
        cls.__module__, cls.__qualname__ = home, cls.__name__
        setattr(sys.modules[home], cls.__name__, cls)
    return {cls.__name__: cls for cls in homes}


def pickled_version(form: str, classes: dict[str, type], monkeypatch: pytest.MonkeyPatch) -> Any:
    """1.15.6 as three releases of packaging pickle it, or as a word."""
    module = sys.modules["packaging.version"]
    if form == "to 25":
        return classes["Version"]((1, 15, 6))
    if form == "26.0":
        slots = classes["SlotVersion"]
        slots.__name__ = slots.__qualname__ = "Version"
        monkeypatch.setattr(module, "Version", slots)
        return slots((1, 15, 6))
    if form == "26.2":
        monkeypatch.setattr(module, "Version", Version)
        return Version("1.15.6")
    return "1.15.6"


def trainer(case: Recorded, version: Any, warmup: type) -> dict[str, Any]:
    """What the trainer saves, with the optimizer inside its warm-up scheduler."""
    weight = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 3},
        "warmup_scheduler": warmup(optimizer),
        "model": {name: torch.randn(x.shape) for name, x in case["state"].items()},
        "version": version,
        "step": torch.tensor([3]),
        "ema": {"step": torch.tensor(3), "initted": torch.tensor(True)},
        "ema_model": case["state"] | {"clip.clip.visual.proj": torch.zeros(2, 2)},
    }


@pytest.mark.parametrize("container", ["tracker", "trainer"])
@pytest.mark.parametrize("form", ["to 25", "26.0", "26.2", "word"])
def test_every_container_is_read(
    tmp_path: Path,
    original_classes: dict[str, type],
    monkeypatch: pytest.MonkeyPatch,
    container: str,
    form: str,
) -> None:
    told = recorded("1.15.6", "released")
    version = pickled_version(form, original_classes, monkeypatch)
    contents = {"version": version, "model": told["state"]}
    if container == "trainer":
        contents = trainer(told, version, original_classes["LinearWarmup"])
    folder = write(tmp_path, told, contents)
    monkeypatch.undo()  # the classes are gone
    for path in (folder, folder / "prior.pth"):
        prior = load_dalle2_pytorch_prior(path)
        close(
            predict(prior, told, prior.network.encode_context(**conditions(told))), told["output"]
        )
    with pytest.raises(ValueError, match=r"version must be that of .* 1.15.6; got '1.0.2'"):
        load_dalle2_pytorch_prior(folder, version="1.0.2")


def test_the_config_is_read_off_the_weights_where_its_file_is_missing(tmp_path: Path) -> None:
    told = recorded("1.15.6", "released")
    with_file = load(tmp_path / "with", "1.15.6", told)
    without = load_dalle2_pytorch_prior(write(tmp_path / "without", told, config=None))
    assert without.config == with_file.config
    other = recorded("1.15.6", "other")
    bare = write(tmp_path / "other", other, config=None)
    prior = load_dalle2_pytorch_prior(bare, version="1.15.6")
    assert prior.config.diffusion.beta_schedule == "linear"  # by the betas in the file
    context = prior.network.encode_context(**conditions(other))
    close(predict(prior, other, context), other["output"])


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_checkpoint_loads_by_its_path(tmp_path: Path) -> None:
    told = recorded("1.15.6", "released")
    folder = write(tmp_path, told)
    for path in (folder, folder / "prior.pth"):
        prior = load_stages(path, only={"prior"}).prior
        assert prior is not None
        close(predict(prior, told, prior.encode_context(text_of(told))), told["output"])
    with pytest.raises(FileNotFoundError, match=r"lacks a clip: take that of another model"):
        load_stages(folder)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    told = recorded("1.15.6", "released")
    trace = tmp_path / "trace"
    folder = write(tmp_path, told, {"model": told["state"], "extra": Evil(f"touch {trace}")})
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system, which could run code"):
        load_dalle2_pytorch_prior(folder)
    assert not trace.exists()
    folder = write(tmp_path, told, {"model": told["state"], "best": Path("x")})
    with pytest.raises(ValueError, match=r"asks for pathlib"):
        load_dalle2_pytorch_prior(folder)


def test_files_that_are_no_such_prior_are_refused(tmp_path: Path) -> None:
    told = recorded("1.15.6", "released")
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_dalle2_pytorch_prior(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"one .pth or .pt file; found none"):
        load_dalle2_pytorch_prior(tmp_path)
    decoder = {"unets.0.init_conv.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"holds no diffusion prior .* starts with unets.0"):
        load_dalle2_pytorch_prior(write(tmp_path, told, decoder))
    with pytest.raises(ValueError, match="must hold a dictionary; got a list"):
        load_dalle2_pytorch_prior(write(tmp_path, told, [torch.zeros(2)]))  # type: ignore[arg-type]
    whole = write(tmp_path, told) / "prior.pth"
    for damaged in (whole.read_bytes()[:5000], b"<html>not found</html>", b""):
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            load_dalle2_pytorch_prior(tmp_path / "damaged.pt")
    with pytest.raises(FileNotFoundError, match=r"found damaged.pt, prior.pth"):
        load_dalle2_pytorch_prior(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    told = recorded("1.15.6", "released")
    whole = dict(told["state"])
    layer = "net.causal_transformer.layers.1."
    told["state"] = {k: v for k, v in whole.items() if not k.startswith(f"{layer}1.")}
    told["state"][f"{layer}0.new"] = torch.zeros(2)
    told["state"][f"{layer}0.norm.g"] = torch.zeros(7)
    with pytest.raises(ValueError) as refused:
        load(tmp_path, "1.15.6", told)
    said = str(refused.value)
    assert f"4 missing: {layer}1.0.g, {layer}1.1.weight" in said
    assert f"1 unknown: {layer}0.new" in said
    assert f"1 of another shape: {layer}0.norm.g ([7] for [24])" in said
    assert "cut short, or of a version that is not supported" in said

    told["state"] = {k: v for k, v in whole.items() if k != "net.learned_query"}
    with pytest.raises(ValueError, match=r"must hold net.learned_query"):
        load(tmp_path, "1.15.6", told)


@pytest.mark.parametrize(
    ("written", "said", "match"),
    [
        ("1.0.3", None, r"does not say which version .* pass version \(such as '1.0.2'\)"),
        ("1.0.3", "newest", "version must be one of DALLE2-pytorch's, such as '1.0.2'"),
        ("1.0.3", "1.15.6", r"those of DALLE2-pytorch 0.23.3 up to, without, 1.9; got .* 1.15.6"),
        ("1.15.6", "1.0.2", r"those of DALLE2-pytorch 1.9 up to, without, 2; got .* 1.0.2"),
        ("0.15.4", "0.16.1", r"those of DALLE2-pytorch 0.11 up to, without, 0.16; got .* 0.16.1"),
        ("1.0.3", "0.16.9", r"those of DALLE2-pytorch 0.23.3 up to, .* got version 0.16.9"),
    ],
)
def test_a_version_that_cannot_be_is_refused(
    tmp_path: Path, written: str, said: str | None, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        load_dalle2_pytorch_prior(write(tmp_path, recorded(written, "released")), version=said)


@pytest.mark.parametrize(
    ("section", "changes", "match"),
    [
        ("net", {"heads": 5}, r"net.heads .* must be that of .*, 2; got 5: .* another checkpoint"),
        ("net", {"max_text_len": 77}, "net.max_text_len .* 8; got 77"),
        ("prior", {"beta_schedule": "linear"}, "noise schedule .* got 'linear' over 8 timesteps"),
        ("prior", {"timesteps": 9}, "noise schedule .* over 9 timesteps"),
        ("prior", {"init_image_embed_l2norm": True}, "init_image_embed_l2norm .* must be false"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, section: str, changes: dict[str, Any], match: str
) -> None:
    told = recorded("1.15.6", "released")
    prior = told["config"]["prior"]
    (prior["net"] if section == "net" else prior).update(changes)
    with pytest.raises(ValueError, match=match):
        load(tmp_path, "1.15.6", told)


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    told = recorded("1.15.6", "released")
    with pytest.raises(ValueError, match="must describe a prior and its 'net'"):
        load_dalle2_pytorch_prior(write(tmp_path, told, config={"prior": 3}))
    (tmp_path / "prior_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_dalle2_pytorch_prior(tmp_path)


def test_a_prior_never_trained_without_its_text_refuses_guidance(tmp_path: Path) -> None:
    told = recorded("1.15.6", "released")
    told["config"]["prior"]["cond_drop_prob"] = 0.0
    prior = load(tmp_path, "1.15.6", told)
    assert prior.config.network.null_condition == "absent"
    with pytest.raises(ValueError, match="use guidance_scale=1"):
        prior.network.null_context(**conditions(told))
    none = torch.zeros(3, dtype=torch.bool)  # as training passes it
    context = prior.network.encode_context(**conditions(told), drop_text=none)
    close(predict(prior, told, context), told["output"])


# --------------------------------------------------------------------------------- the network

TINY = MultiQueryPriorConfig(
    embed_dim=16, max_text_len=6, depth=2, num_heads=3, head_dim=8, mlp_ratio=2, num_timesteps=8
)
VARIANTS = {
    "newest": TINY,
    "masked": replace(
        TINY, similarity="dot", padding="masked", null_condition="masked", norm_out="plain"
    ),
    "dot": replace(TINY, similarity="dot", position_bias_scale=128.0),
    "many tokens": replace(
        TINY, num_text_embed_tokens=2, num_image_embed_tokens=2, time_tokens="sinusoid"
    ),
}


def tiny_conditions() -> dict[str, Tensor]:
    mask = torch.arange(5)[None] < torch.tensor([[5], [2]])
    embed, encodings = torch.randn(2, 16), torch.randn(2, 5, 16)
    return {"text_embed": embed, "text_encodings": encodings, "text_mask": mask}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant: str) -> None:
    torch.manual_seed(0)
    network = MultiQueryPrior(replace(VARIANTS[variant], attn_dropout=0.1, mlp_dropout=0.1))
    half = torch.tensor([True, False])
    context = network.encode_context(**tiny_conditions(), drop_text=half)
    network(torch.randn(2, 16), torch.tensor([1, 7]), context).square().mean().backward()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_contexts_are_dictionaries_with_the_batch_first(variant: str) -> None:
    """Guidance concatenates two contexts key by key and runs both at once."""
    torch.manual_seed(0)
    network = MultiQueryPrior(VARIANTS[variant]).eval()
    first = network.encode_context(**tiny_conditions())
    second = network.null_context(**tiny_conditions())
    both = {k: None if x is None else torch.cat([x, second[k]]) for k, x in first.items()}
    x_t, timesteps = torch.randn(2, 16), torch.tensor([1, 7])
    y = network(torch.cat([x_t, x_t]), timesteps.repeat(2), both)
    expected = torch.cat([network(x_t, timesteps, context) for context in (first, second)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dropped = torch.ones(2, dtype=torch.bool)
    same = network.encode_context(**tiny_conditions(), drop_text=dropped)
    torch.testing.assert_close(network(x_t, timesteps, same), expected[2:])


def test_the_network_runs_in_bf16() -> None:
    torch.manual_seed(0)
    network = MultiQueryPrior(TINY).eval()
    given = tiny_conditions()
    x_t, timesteps = torch.randn(2, 16), torch.tensor([1, 7])
    full = network(x_t, timesteps, network.encode_context(**given))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x_t, timesteps, network.encode_context(**given))
    network.to(torch.bfloat16)
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    half = network(x_t.bfloat16(), timesteps, network.encode_context(**given))
    assert half.dtype == torch.bfloat16
    for low in (mixed, half):
        assert F.cosine_similarity(low.float(), full).min() > 0.98


def test_the_network_refuses_what_does_not_fit() -> None:
    network, given = MultiQueryPrior(TINY), tiny_conditions()
    for name in ("text_embed", "text_encodings"):
        wrong = torch.randn(*given[name].shape[:-1], 11)
        with pytest.raises(ValueError, match=rf"{name} must be 16 wide .*got 11: .*CLIP"):
            network.encode_context(**(given | {name: wrong}))
    long = {"text_encodings": torch.randn(2, 7, 16), "text_mask": None}
    with pytest.raises(ValueError, match="max_text_len = 6 tokens; got 7"):
        network.encode_context(**(given | long))
    with pytest.raises(ValueError, match="x_t must be 16 wide"):
        network(torch.randn(2, 11), torch.tensor([1, 7]), network.encode_context(**given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "prior.depth must be at least 1; got 0"),
        ({"head_dim": 7}, "prior.head_dim must be even with prior.rotary; got 7: use 8"),
        ({"embed_dim": 15, "time_tokens": "sinusoid"}, "prior.embed_dim must be even .* got 15"),
        ({"position_bias_scale": 0.0}, "prior.position_bias_scale must be positive; got 0.0"),
        ({"mlp_dropout": 1.0}, r"prior.mlp_dropout must lie in \[0, 1\); got 1.0"),
        ({"similarity": "euclid"}, "prior.similarity must be one of cosine, dot; got 'euclid'"),
        ({"padding": "masked"}, "prior.null_condition must be 'masked' exactly where"),
        ({"null_condition": "absent"}, "prior.text_drop_prob must be 0 .* got 0.1"),
        (
            {"padding": "masked", "null_condition": "masked", "reads_text_encodings": False},
            "prior.reads_text_encodings must be true with prior.padding 'masked'",
        ),
    ],
)
def test_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_the_table_of_timesteps_must_cover_the_chain() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps = 1000; got 8: use 1000"):
        MultiQueryDiffusionPriorConfig(network=TINY)
