"""Loss curve of a run as a picture: `python -m pretrain.plot RUN` writes RUN/loss.png."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.cli import program
from pretrain.metrics.writers import METRICS_NAME, read_metrics

_PICTURE = "loss.png"
_EXAMPLE = """example:
  %(prog)s runs/demo
"""
_UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def plot_losses(run_dir: Path, output: Path) -> None:
    """Training and evaluation loss over the tokens seen, from RUN_DIR/metrics.jsonl to `output`.

    Raises:
        ValueError: no metrics there, or none with a loss.
    """
    path = run_dir / METRICS_NAME
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist: give the run_dir of a run")
    records = read_metrics(path)
    training = _series(records, "lm_loss")
    evaluation = _series(records, "eval_loss")
    if not training and not evaluation:
        raise ValueError(f"{str(path)!r} has no losses yet: wait for the first logged step")
    scale, unit = _unit(max(tokens for tokens, _ in training + evaluation))
    figure = _draw(training, evaluation, scale=scale, unit=unit, title=run_dir.resolve().name)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def _series(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(r["tokens"], r[key]) for r in records if r.get(key) is not None and "tokens" in r]


def _unit(most: float) -> tuple[float, str]:
    scale, name = next(((s, n) for s, n in _UNITS if most >= s), (1.0, ""))
    return scale, f"{name} of tokens" if name else "tokens"


def _draw(
    training: Sequence[tuple[float, float]],
    evaluation: Sequence[tuple[float, float]],
    *,
    scale: float,
    unit: str,
    title: str,
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        tokens, losses = zip(*training, strict=True)
        axes.plot([t / scale for t in tokens], losses, color="0.55", lw=1.2, label="training")
    if evaluation:
        tokens, losses = zip(*evaluation, strict=True)
        last = f"held-out text (last {losses[-1]:.3f})"
        axes.plot([t / scale for t in tokens], losses, "o-", color="C0", ms=4, label=last)
    axes.set(title=title, xlabel=f"Tokens seen ({unit})", ylabel="Cross entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw training and evaluation loss over tokens."""
    parser = argparse.ArgumentParser(
        prog=program("python -m pretrain.plot"),
        description=main.__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the picture (default: RUN/{_PICTURE})"
    )
    options = parser.parse_args(arguments)
    output = options.output or options.run_dir / _PICTURE
    try:
        plot_losses(options.run_dir, output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
