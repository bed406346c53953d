"""Configs: the command line, YAML files, and what bad values are told."""

import ast
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from unclip.config import from_dict, parse, to_dict
from unclip.training.clip import TrainCLIPConfig
from unclip.training.decoder import TrainDecoderConfig
from unclip.training.oracle import TrainOracleConfig
from unclip.training.prior import TrainPriorConfig

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
KINDS = {
    "clip": TrainCLIPConfig,
    "oracle": TrainOracleConfig,
    "prior": TrainPriorConfig,
    "decoder": TrainDecoderConfig,
    "upsampler": TrainDecoderConfig,
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section."""

    rate: float = 1.0
    """Not negative."""
    sides: tuple[int, ...] = (1, 2)
    """Numbers."""
    kind: Literal["a", "b"] = "a"
    """A closed choice."""

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"section.rate must not be negative; got {self.rate}: use 1.0")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A config."""

    section: Section = field(default_factory=Section)
    """Nested."""
    optional: Section | None = None
    """Nested or absent."""
    fresh: bool = False
    """A switch."""
    max_steps: int = 3
    """A number."""
    names: tuple[str, ...] | None = None
    """Names."""


def test_last_part_of_a_name_is_enough_and_dashes_are_underscores() -> None:
    config = parse(Whole, ["--max-steps", "7", "--section.rate", "0.5", "--fresh"])
    assert (config.max_steps, config.section.rate, config.fresh) == (7, 0.5, True)


def test_a_switch_takes_a_value_too() -> None:
    assert parse(Whole, ["--fresh", "false"]).fresh is False


def test_flags_reach_into_an_optional_section(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optional: {rate: 5}\n")
    config = parse(Whole, ["--config", str(file), "--optional.kind", "b"])
    assert config.optional == Section(rate=5.0, kind="b")
    assert parse(Whole, []).optional is None


@pytest.mark.parametrize(
    "words", [["--names", "a.b", "*.c"], ['--names=["a.b","*.c"]'], ["--names", '[a.b, "*.c"]']]
)
def test_names_may_be_typed_word_by_word(words: list[str]) -> None:
    config = parse(Whole, [*words, "--max-steps", "7"])
    assert (config.names, config.max_steps) == (("a.b", "*.c"), 7)


def test_yaml_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_steps: 5\nsection: {sides: [4, 5, 6]}\n")
    config = parse(Whole, ["--config", str(file), "--max-steps", "9"])
    assert config.section.sides == (4, 5, 6)
    assert config.max_steps == 9
    assert parse(Whole, [], default_config=file).max_steps == 5


def test_round_trip_through_plain_values() -> None:
    config = Whole(section=Section(sides=(3,)), optional=Section(rate=2.0))
    assert from_dict(Whole, to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_step": 1}, "did you mean 'max_steps'"),
        ({"section": {"rat": 1}}, "did you mean 'section.rate'"),
        ({"section": {"rate": -1}}, "section.rate must not be negative; got -1.0: use 1.0"),
        ({"section": {"kind": "c"}}, "Got value: c"),
        ({"optional": {"kind": "c"}}, "optional.*kind.*Got value: c$"),
        ({"optional": {"rat": 1}}, "did you mean 'optional.rate'"),
        ({"optional": {"rate": -1}}, "^section.rate must not be negative; got -1.0: use 1.0$"),
        ({"optional": 3}, "optional must hold keys and their values; got 3"),
        ({"section": None}, "section must hold keys and their values; got None"),
        ({"max_steps": "many"}, "max_steps.*Got value: many"),
    ],
)
def test_bad_values_name_the_field(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_dict(Whole, values)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max-stesp", "3"], "did you mean 'max_steps'"),
        (["--rate", "1"], "--rate could mean --section.rate, --optional.rate: write it out"),
        (["--optional.raet", "1"], "did you mean 'optional.rate'"),
        (["--optional.rate", "-1"], "error: section.rate must not be negative"),
        (["--max-steps", "few"], "max_steps"),
        (["--config", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_bad_command_lines_end_in_one_line_and_status_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Whole, argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_unknown_key_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("section: {raet: 1}\n")
    with pytest.raises(SystemExit):
        parse(Whole, ["--config", str(file)])
    assert (
        "unknown config key 'section.raet': did you mean 'section.rate'" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "path",
    # Those of accelerate/ are Accelerate's own, which tests/test_parallel.py loads.
    [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.parent.name in KINDS],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_every_shipped_config_loads(path: Path) -> None:
    parse(KINDS[path.parent.name], ["--config", str(path)])


def test_every_field_of_every_config_says_what_it_is() -> None:
    """A string below each field, where its readers look."""
    said = {}
    for path in sorted((ROOT / "unclip").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Options")):
                where = f"{path.relative_to(ROOT)}: {node.name}"
                assert "dataclass(frozen=True, kw_only=True)" in map(
                    ast.unparse, node.decorator_list
                ), where
                for line, below in itertools.pairwise([*node.body, ast.Pass()]):
                    if isinstance(line, ast.AnnAssign):
                        is_string = ast.unparse(below).startswith(("'", '"'))
                        said[f"{where}.{ast.unparse(line.target)}"] = is_string
    assert len(said) > 100
    assert [name for name, is_string in said.items() if not is_string] == []
