"""The corpora of a run: complete, of its vocabulary and tokenizer, and long enough."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.loading.builders import data_warnings, epochs_per_source
from data_tools.sampling.curriculum import Curriculum
from parallel.context import Axis
from pretrain.config import RunConfig
from pretrain.config.layout import RunLayout
from pretrain.doctor.findings import Finding, of_message
from pretrain.missing_data import missing_data
from pretrain.run_data import open_held_out_data, open_training_data

SECTION = "data"


def check_data(config: RunConfig, layout: RunLayout) -> Iterator[Finding]:
    """Open the data as a run does, and plan its steps; yields one finding for each problem.

    Raises:
        ConfigError, DataError: the steps cannot be planned.
    """
    missing = list(missing_data(config.data))
    if missing:  # everything else would fail for the same reason
        yield from (Finding(SECTION, "error", *each) for each in missing)
        return
    axis = Axis(layout.data)
    with open_training_data(config, axis) as loader:
        curriculum, sources = loader.curriculum, loader.sources
        epochs = epochs_per_source(curriculum, loader)
        held_out = open_held_out_data(config, axis)
        for line in data_warnings(config.data, curriculum, loader, held_out):
            yield of_message(SECTION, "warning", line)
    for name, stream in sources:
        yield Finding(
            SECTION,
            "ok",
            f"data.train source {name}: {stream.num_tokens:,} tokens, read "
            f"{epochs.get(name, 0.0):.3g} times by the end of the run",
        )
    yield _length(curriculum)
    if held_out is None:
        yield Finding(
            SECTION,
            "warning",
            "data.validation is empty: the run reports no held-out loss",
            "set data.validation, for example to a part made by python -m data_tools.split",
        )
    else:
        yield Finding(
            SECTION, "ok", f"data.validation: {held_out.num_tokens:,} tokens are scored each time"
        )


def _length(curriculum: Curriculum) -> Finding:
    tokens = curriculum.tokens_after(curriculum.total_steps)
    return Finding(
        SECTION, "ok", f"the run takes {curriculum.total_steps:,} steps, {tokens:,} tokens"
    )
