"""Configs: frozen dataclasses, filled from YAML files and the command line by jsonargparse."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

T = TypeVar("T")


def _parser(config_class: type, description: str | None = None) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, description=description, default_env=False)
    parser.add_argument("--config", action="config", help="YAML file; flags after it win")
    parser.add_class_arguments(config_class, fail_untyped=True)
    return parser


def _section(hint: Any) -> type | None:
    """The config class in a field's type: the type itself, or the class of `Section | None`."""
    options = [option for option in (hint, *get_args(hint)) if isinstance(option, type)]
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _keys(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field, those of nested and of optional sections included."""
    keys: dict[str, Any] = {}
    for name, hint in get_type_hints(config_class).items():
        keys[prefix + name] = hint
        if (section := _section(hint)) is not None:
            keys |= _keys(section, f"{prefix}{name}.")
    return keys


def _spell_out(argv: Sequence[str], config_class: type) -> list[str]:
    """Let users type the last part of a name: `--max-steps 20` for `--fit.max_steps 20`.

    Dashes and underscores are the same, a bare switch means true, a list of names may be typed word
    by word (`--freeze unet.down text_to_tokens`), and a last part that several sections share must
    be written out.
    """
    keys = {"config": Path, **_keys(config_class)}
    full: list[str] = []
    listed = 0  # words ahead that the flag before them has taken
    for i, word in enumerate(argv):
        if listed:
            listed -= 1
            continue
        if not word.startswith("--") or word.startswith(("--help", "--print_config")):
            full.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in keys:
            matches = [key for key in keys if key.rsplit(".", 1)[-1] == name]
            if len(matches) > 1:
                raise ValueError(
                    f"--{name} could mean {', '.join('--' + m for m in matches)}: write it out"
                )
            if not matches:
                raise ValueError(_unknown(name, keys))
            name = matches[0]
        if _is_names(keys[name]) and not equals:
            values = list(itertools.takewhile(lambda w: not w.startswith("--"), argv[i + 1 :]))
            if values and not values[0].startswith("["):  # which is YAML's own list
                listed = len(values)
                equals, value = "=", json.dumps(values)
        full.append(f"--{name}{equals}{value}")
        next_is_flag = i + 1 == len(argv) or argv[i + 1].startswith("--")
        if keys[name] is bool and not equals and next_is_flag:
            full.append("true")
    return full


def _is_names(hint: Any) -> bool:
    """Whether a field's type is a tuple of strings, or of strings or None."""
    return any(option == tuple[str, ...] for option in (hint, *get_args(hint)))


def _unknown(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    leaves = {key.rsplit(".", 1)[-1]: key for key in known}
    near = difflib.get_close_matches(name, known, 1) or [
        leaves[leaf] for leaf in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, 1)
    ]
    hint = f"did you mean {near[0]!r}?" if near else "see --help for the keys there are"
    return f"unknown config key {name!r}: {hint}"


def _check_keys(values: Any, config_class: type, prefix: str = "") -> None:
    """Raise on the first key that `config_class` lacks, with the nearest it has."""
    if not isinstance(values, Mapping):
        where = prefix.removesuffix(".") or "a config"
        raise ValueError(f"{where} must hold keys and their values; got {values!r}")
    fields = get_type_hints(config_class)
    for key, value in values.items():
        if key not in fields:
            raise ValueError(_unknown(f"{prefix}{key}", [prefix + name for name in fields]))
        section = _section(fields[key])
        if section is not None and (value is not None or fields[key] is section):
            _check_keys(value, section, f"{prefix}{key}.")


def from_dict(config_class: type[T], values: Mapping[str, Any]) -> T:
    """Build a config from plain values; unknown keys and wrong types raise ValueError."""
    _check_keys(values, config_class)
    parser = _parser(config_class)
    try:
        return _instantiate(parser, config_class, parser.parse_object(dict(values)))
    except (ArgumentError, TypeError, KeyError, ValueError) as error:
        raise ValueError(_reason(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a config, fit for YAML: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def parse(
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    default_config: Path | None = None,
    description: str | None = None,
) -> T:
    """Read a config from the command line.

    Args:
        config_class: a dataclass whose sections are dataclasses.
        argv: words to parse; None takes those of this process.
        default_config: YAML used when no `--config` is given.

    Raises:
        SystemExit: with status 2 and one line that says what is wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    given = any(word == "--config" or word.startswith("--config=") for word in words)
    if default_config is not None and not given:
        words = ["--config", str(default_config), *words]
    parser = _parser(config_class, description)
    with one_line_errors():
        try:
            for path in _config_files(words):
                values = yaml.safe_load(path.read_text()) or {}
                _check_keys(values, config_class)
            words = _spell_out(words, config_class)
            return _instantiate(parser, config_class, parser.parse_args(words))
        except (ArgumentError, TypeError, yaml.YAMLError) as error:
            raise ValueError(str(error)) from error
    raise AssertionError("unreachable")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend (bad values, missing or unwritable files) into one line on stderr
    and exit status 2; anything else is a defect and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {_reason(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _config_files(words: Sequence[str]) -> list[Path]:
    pairs = zip(words, [*words, ""][1:], strict=True)
    found = [
        after if word == "--config" else word[9:]
        for word, after in pairs
        if word == "--config" or word.startswith("--config=")
    ]
    return [Path(name) for name in found]


def _instantiate(parser: ArgumentParser, config_class: type[T], values: Namespace) -> T:
    built = parser.instantiate(values)
    names = [f.name for f in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: built[name] for name in names})


def _reason(error: Exception) -> str:
    """One line that says what is wrong. Of a value that fits none of an optional field's types
    jsonargparse also says that it is not None, and dumps it if it is a section; torch puts the
    traceback of a data worker before its error: leave that out."""
    none = r"\s*- Expected a <class 'NoneType'>.*"
    text = re.sub(r"^Caught .*Original Traceback .*\n\S*Error: ", "", str(error), flags=re.DOTALL)
    text = re.sub(r"\s*Does not validate against .*?Errors:", "", text, flags=re.DOTALL)
    text = re.sub(none + r"Given value: ([^\s({]+)$", r". Got value: \1", text, flags=re.DOTALL)
    text = re.sub(none, "", text, flags=re.DOTALL)
    text = re.sub(r"\n\s*- (Problem with given class_path .*?:)?", "\n", text)
    return re.sub(r"\s*\n\s*", " ", re.sub(r"(?<=[^:\s])\s*\n\s*", "; ", text)).strip()
