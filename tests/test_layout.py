"""Holds who may import whom: reads the imports of every module in unclip/ without running it.

A room is a module or a folder directly inside unclip/. Imports inside functions and under
`if TYPE_CHECKING` count too: a deferred import ties two rooms together just the same.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unclip"

# How any room reads its config and its files; they know nothing of what they hold.
FOUNDATION = {"config", "checkpoint"}
LEAVES = {"clip", "diffusion", "models", "data"}
STAGES = {"priors", "stages", "glide"}

# Room -> the other rooms it may import. A room may be absent from the tree, but not from here.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "checkpoint": set(),
    "lora": FOUNDATION,
    "pictures": {"data"},
    "pretrained": set(),
    "clip": FOUNDATION,
    "diffusion": FOUNDATION,
    "models": FOUNDATION,
    "data": FOUNDATION,
    "priors": FOUNDATION | {"diffusion", "models"},
    "stages": FOUNDATION | {"diffusion", "models", "priors"},
    "glide": FOUNDATION | {"diffusion", "models", "stages"},
    "hub": FOUNDATION | STAGES | {"clip", "diffusion", "lora", "models", "pretrained"},
    "training": FOUNDATION | LEAVES | STAGES | {"lora", "hub"},
    "pipeline": FOUNDATION | LEAVES | STAGES | {"hub"},
    "edits": FOUNDATION | LEAVES | STAGES | {"hub", "pictures", "pipeline"},
    "evaluation": FOUNDATION | LEAVES | STAGES | {"hub", "pipeline", "edits"},
    "__init__": {"pipeline"},  # unclip/__init__.py itself
    # What is run by `python -m` puts rooms together as the scripts do, and nobody imports it.
    "embed": {"training"},
    "evaluate": {"config", "evaluation", "training"},
    "evaluation.sweep": {"config", "evaluation", "training"},
    "plan": FOUNDATION | LEAVES | STAGES | {"hub", "training"},
    "data.__main__": FOUNDATION | {"data", "hub"},
}
COMMANDS = {"embed", "evaluate", "evaluation.sweep", "plan", "data.__main__"}

# Library -> the only room that knows it.
EXCLUSIVE = {"accelerate": "training", "peft": "lora"}

# What stands beside the package may import it, never the other way round.
OUTSIDE = {"tests", "docs", "benchmarks"} | {script.stem for script in ROOT.glob("*.py")}

NAMELESS = {"util", "utils", "helper", "helpers", "misc", "common"}


def module_name(path: Path) -> str:
    """`unclip/models/unet.py` -> `unclip.models.unet`; a package keeps its `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    """`unclip.models.unet` -> `models`; the bare package is the room `__init__`, and a command
    that has a row of its own in the table is one."""
    name = module.removeprefix("unclip.")
    if name in COMMANDS:
        return name
    return module.split(".")[1] if "." in module else "__init__"


def imported_names(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of all that `source` imports, relative imports resolved."""
    folder = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def violations(source: str, module: str, outside: set[str] = OUTSIDE) -> list[str]:
    """One line for each import in `source` that the tables above forbid to `module`."""
    room = room_of(module)
    if room not in ALLOWED:
        return [f"{module}: unclip/{room} is not in ALLOWED in tests/test_layout.py: add it there"]
    found = []
    for line, name in imported_names(source, module):
        where = f"{module}:{line}"
        top = name.split(".")[0]
        if top == "unclip":
            target = room_of(name)
            if target not in ALLOWED[room] | {room, "__version__"}:
                found.append(f"{where}: {room} may not import {name}")
        elif top in outside:
            found.append(f"{where}: the package may not import {name}, which stands outside it")
        elif EXCLUSIVE.get(top, room) != room:
            found.append(f"{where}: only unclip/{EXCLUSIVE[top]} may import {top}")
    return found


def package_modules() -> list[Path]:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert modules, f"no modules found in {PACKAGE}"
    return modules


def test_every_module_keeps_the_layering() -> None:
    found = [
        line
        for path in package_modules()
        for line in violations(path.read_text(encoding="utf-8"), module_name(path))
    ]
    assert not found, "\n" + "\n".join(found)


def test_only_training_imports_accelerate() -> None:
    importers = {
        room_of(module_name(path))
        for path in package_modules()
        for _, name in imported_names(path.read_text(encoding="utf-8"), module_name(path))
        if name.split(".")[0] == "accelerate"
    }
    assert importers <= {"training"}


def test_every_module_is_named_for_its_subject() -> None:
    nameless = [
        module_name(path)
        for path in package_modules()
        if NAMELESS & set(path.relative_to(PACKAGE).with_suffix("").parts)
    ]
    assert not nameless, f"a helper lives in the room that owns its subject: rename {nameless}"


def test_the_table_is_consistent() -> None:
    unknown = set().union(*ALLOWED.values()) - set(ALLOWED)
    assert not unknown
    assert all(not ALLOWED[room] for room in FOUNDATION)
    assert all(ALLOWED[leaf] <= FOUNDATION for leaf in LEAVES)
    rooms = {room: allowed for room, allowed in ALLOWED.items() if room not in COMMANDS}
    assert all("training" not in allowed for allowed in rooms.values())
    assert all(not allowed & COMMANDS for allowed in ALLOWED.values())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("unclip.models.unet", "from unclip.diffusion import schedules"),
        ("unclip.models.unet", "import unclip.diffusion.schedules"),
        ("unclip.models.unet", "from unclip import data"),
        ("unclip.models.unet", "from ..diffusion.schedules import alpha_bar"),
        ("unclip.models.__init__", "from .. import clip"),
        ("unclip.models.unet", "def f():\n    from unclip import clip"),
        ("unclip.models.unet", "if TYPE_CHECKING:\n    import unclip.clip"),
        ("unclip.clip", "from .data import shards"),
        ("unclip.priors.linear", "from unclip.clip import Clip"),
        ("unclip.training.fit", "from unclip.pipeline import UnCLIP"),
        ("unclip.pipeline", "from unclip.training import fit"),
        ("unclip.hub.load", "import unclip.training"),
        ("unclip.hub.load", "from unclip.pipeline import UnCLIP"),
        ("unclip.stages", "from unclip.hub import resolve"),
        ("unclip.priors.linear", "from unclip.stages import DecoderStage"),
        ("unclip.checkpoint", "from unclip.config import to_dict"),
        ("unclip.edits", "from unclip.training.ema import EMA"),
        ("unclip.evaluation.fid", "from unclip import training"),
        # The lazy attribute and the bare package would hide which room is meant.
        ("unclip.models.unet", "from unclip import UnCLIP"),
        ("unclip.models.unet", "import unclip"),
        ("unclip.models.unet", "from unclip import *"),
        ("unclip.training.fit", "import train_prior"),
        ("unclip.models.unet", "from accelerate.utils import set_seed"),
        ("unclip.embed", "import accelerate"),
        ("unclip.training.fit", "from unclip.embed import main"),
        ("unclip.data.check", "from unclip.hub import load_clip_of"),
    ],
)
def test_the_check_catches(module: str, source: str) -> None:
    assert len(violations(source, module, outside={"train_prior"})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("unclip.models.unet", "import torch\nfrom unclip.models.layers import Block"),
        ("unclip.models.unet", "from .layers import Block\nfrom . import layers"),
        ("unclip.models.__init__", "from .unet import UNet"),
        ("unclip.priors.linear", "from ..diffusion import schedules"),
        ("unclip.training.fit", "import accelerate\nfrom unclip import clip, data, priors"),
        ("unclip.training.fit", "from unclip.hub import load_clip_of"),
        ("unclip.hub.publish", "from unclip import __version__, stages"),
        ("unclip.pipeline", "from unclip.hub import load_stages"),
        ("unclip.embed", "from unclip.training.embed import main"),
        ("unclip.data.__main__", "from unclip.hub import load_clip_of"),
        ("unclip.clip", "from unclip.checkpoint import load_weights"),
        ("unclip.edits", "from .hub import load"),
        ("unclip.__init__", "def f():\n    from unclip.pipeline import UnCLIP"),
    ],
)
def test_the_check_allows(module: str, source: str) -> None:
    assert violations(source, module, outside={"train_prior"}) == []


def test_an_unknown_room_says_to_add_it_to_the_table() -> None:
    (message,) = violations("", "unclip.novelty.idea")
    assert "unclip/novelty is not in ALLOWED" in message
    assert "add it" in message


def test_importing_the_package_is_light() -> None:
    # A fresh interpreter: other tests have long imported torch into this one.
    code = "import sys, unclip; assert 'torch' not in sys.modules; assert unclip.__version__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
