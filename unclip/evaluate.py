"""Draw a protocol's captions and measure the pictures: `python -m unclip.evaluate --config
configs/evaluation/shapes.yaml --model shapes --out results/shapes`.

`accelerate launch -m unclip.evaluate ...` shares the drawing out over processes. The same command
again goes on from the pictures that are there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unclip.config import one_line_errors, parse
from unclip.evaluation.drawing import Crew
from unclip.evaluation.run import EvaluateConfig, evaluate, format_result
from unclip.training.parallel import patient_accelerator


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, and print a table."""
    config = parse(EvaluateConfig, argv, description=__doc__)
    with one_line_errors():
        accelerator = patient_accelerator()
        crew = Crew(
            accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        )
        words = sys.argv[1:] if argv is None else argv
        command = ["python", "-m", "unclip.evaluate", *words]
        result = evaluate(config, crew, str(accelerator.device), command)
        if result is not None:
            print(f"{format_result(result)}\n{config.out / 'result.json'}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
