"""Evaluate a protocol at several values of one setting: `python -m unclip.evaluation.sweep
--config configs/evaluation/shapes.yaml --model shapes --axis guidance --values 1 1.5 2 3`.

`accelerate launch -m unclip.evaluation.sweep ...` shares the drawing out over processes. The same
command again goes on where it stopped; further values are added. All flags of `unclip.evaluate` are
taken too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from unclip.config import one_line_errors, parse, to_dict
from unclip.evaluation.drawing import Crew
from unclip.evaluation.protocol import protocol_values
from unclip.evaluation.run import EvaluateConfig, evaluate
from unclip.evaluation.sweeping import Axis, folder_name, sweep, typed
from unclip.training.consolidate import consolidate
from unclip.training.parallel import patient_accelerator

CASCADE = {
    "embed": "embed",
    "guidance": "guidance_scale",
    "steps": "decoder_steps",
    "sampler": "sampler",
    "candidates": "num_candidates",
}
"""Axis -> the field of `CascadeOptions` that it varies."""
STAGES = ("model", "prior", "decoder", "upsampler", "dtype")
"""What the points share beside their protocol."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(EvaluateConfig):
    """A protocol, what is measured by it, and what is varied."""

    axis: Axis
    """The decoder's guidance, steps or sampler; what it is given for an image embedding; the prior
    (a model or run to take it from); how many candidates it draws; or the model, a checkpoint each:
    `runs/decoder/checkpoints/step-0001000`, or the folder of any model."""
    values: tuple[str, ...]
    """Of the axis."""
    out: Path = Path("results/sweep")
    """The sweep's folder."""

    def __post_init__(self) -> None:
        if self.axis == "checkpoint" and self.model is None:
            # The points name their models; the first stands in where one has to be named.
            object.__setattr__(self, "model", next(iter(self.values), None))
        super().__post_init__()
        if self.pictures is not None:
            raise ValueError("pictures must be drawn by a sweep; leave --pictures out")
        for value in typed(self.axis, self.values):
            if self.axis in CASCADE:  # a value that cannot be fails before the first is drawn
                at(self, value, self.out)


def at(config: SweepConfig, value: Any, out: Path) -> EvaluateConfig:
    """What is evaluated at one value of the axis, into the folder `out`."""
    given = {f.name: getattr(config, f.name) for f in fields(EvaluateConfig)} | {"out": out}
    if config.axis in CASCADE:
        given["cascade"] = replace(config.cascade, **{CASCADE[config.axis]: value})
    else:
        given["model" if config.axis == "checkpoint" else config.axis] = str(value)
    return EvaluateConfig(**given)


def shared(config: SweepConfig) -> dict[str, Any]:
    """What all points have in common."""
    found = protocol_values(config) | {k: v for k, v in to_dict(config).items() if k in STAGES}
    if config.axis in CASCADE:
        del found["cascade"][CASCADE[config.axis]]
    else:
        del found["model" if config.axis == "checkpoint" else config.axis]
    return found


def run_sweep(config: SweepConfig, crew: Crew, device: str, command: Sequence[str]) -> None:
    """Evaluate the points that are not finished; every process calls this."""

    def run(value: Any, folder: Path) -> None:
        if config.axis == "checkpoint":
            value = as_model(Path(value), config.out, crew)
        evaluate(at(config, value, folder), crew, device, command)

    values = typed(config.axis, config.values)
    sweep(
        config.out,
        config.axis,
        values,
        shared(config),
        run,
        is_main=crew.is_main,
        wait=crew.wait,
    )


def as_model(path: Path, out: Path, crew: Crew) -> Path:
    """The model of one of a run's checkpoints, put together within `out`; other paths as they
    are."""
    if path.parent.name != "checkpoints" or not path.name.startswith("step-"):
        return path
    model = out / "models" / folder_name("checkpoint", str(path.parent.parent / path.name))
    if crew.is_main and not model.is_dir():
        consolidate(path.parent.parent, model, int(path.name.removeprefix("step-")))
    crew.wait()
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, and write the table and the curves."""
    config = parse(SweepConfig, argv, description=__doc__)
    with one_line_errors():
        accelerator = patient_accelerator()
        crew = Crew(
            accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        )
        words = sys.argv[1:] if argv is None else argv
        command = ["python", "-m", "unclip.evaluation.sweep", *words]
        run_sweep(config, crew, str(accelerator.device), command)
        if crew.is_main:
            print((config.out / "sweep.csv").read_text(), end="")
            print(config.out)
        accelerator.end_training()


if __name__ == "__main__":
    main()
