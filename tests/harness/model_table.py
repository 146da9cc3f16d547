"""The table of models in docs/transformers.md, printed from the models that the tests run.

python -m harness.model_table            write the table into the page, between its two markers
python -m harness.model_table --check    exit with 1 if the table there is out of date
"""

from __future__ import annotations

from pathlib import Path

from .hf_models import DECODERS, GENERATING, INTERPRETED, MODELS
from .support_table import keep

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def table() -> str:
    """A line a model."""
    columns = [
        "model", "its attention has", "forward and backward", "generation", "packed", "padding",
        "kernels in the interpreter",
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, model in MODELS.items():
        yes = [
            "yes", tick(name in GENERATING), tick(name in DECODERS), padding_of(model.kind, name),
            tick(name in INTERPRETED),
        ]  # fmt: skip
        lines.append(f"| `{model.model}` | {model.has or 'nothing else'} | {' | '.join(yes)} |")
    return "\n".join(lines)


def tick(tested: bool) -> str:
    return "yes" if tested else "–"


def padding_of(kind: str, name: str) -> str:
    if kind == "vision" or name == "Whisper":
        return "–"
    return "left" if kind == "decoder" else "right"


if __name__ == "__main__":
    raise SystemExit(keep(PAGE, "models", table))
