"""Tasks of lm_eval during training, at any layout.

lm_eval runs on rank 0 alone. The log-likelihoods that it asks for go out in parts, which all ranks
score together through the engine's pass of an evaluation; meanwhile the others follow what rank 0
sends. So the tasks need no other rank, and the engine nothing of lm_eval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from data_tools.corpus.corpus_info import TextRules
from models.evaluate import load_harness, require_lm_eval, write_results
from models.evaluation.scoring import Request, Score, check_requests
from models.evaluation.task_errors import described
from models.evaluation.texts import Texts, texts_of
from models.prompting import load_prompting
from parallel.checkpoint.errors import AgreedError, is_ours, one_line
from parallel.checkpoint.manifest import TextRecord
from pretrain.config import RunConfig
from pretrain.distributed.consensus import RankGroup
from pretrain.engine.engine import Engine
from pretrain.engine.part_scoring import Part, parts_of
from pretrain.metrics.writers import TASKS_FOLDER
from pretrain.supervision.signals import GracefulStop

T = TypeVar("T")

# Shorter rows than a sequence get a half, a quarter, ... of it, in multiples of this: whatever
# divides a sequence (patches, tensor ranks of sequence parallelism, rows of FP8) divides those.
_UNIT = 128
# Batches of each data rank in a part: several for each stage of a pipeline.
_BATCHES, _BATCHES_A_STAGE = 8, 4
# Between signs of life of rank 0, while it prepares questions and computes metrics.
_SECONDS = 10.0


class _Working(NamedTuple):
    """Rank 0 is at work: other ranks wait on."""


class _End(NamedTuple):
    """Rank 0 is done; `failure`: what stopped it."""

    failure: str | None


class TaskEvaluation:
    """Evaluates the model in training on `evaluation.tasks`; opened by `open_tasks`.

    A row has at most `data.sequence_length` tokens, so that no pass takes more memory than one of
    held-out text. `advance` is told the parts of the work.
    """

    def __init__(
        self, config: RunConfig, text: TextRules, ranks: RankGroup, advance: Callable[[str], object]
    ) -> None:
        self.config, self.text = config, text
        self._ranks, self._advance = ranks, advance
        self._engine: Engine | None = None
        self._scoring = False  # an error is of the engine, which all ranks share
        self._stop = GracefulStop()
        self._stop_asked = False  # of any rank, as rank 0 knows it
        self._last_sign = time.monotonic()
        self._harness: Any = None
        self._tasks: dict[str, Any] = {}
        self._lm: Any = None

    def open(self) -> None:
        """Load the tasks on rank 0 and ask all their questions once, with no model (collective).

        Raises:
            AgreedError: on every rank; a task or a setting cannot be used.
        """
        _, failure = self._lead(self._open_on_rank0)
        if failure is not None:
            raise AgreedError(failure)

    def is_due(self, step: int) -> bool:
        """Whether the tasks are evaluated after `step`, if it is not the last one."""
        return step % self.config.evaluation.interval_of_tasks == 0

    def evaluate(
        self, engine: Engine, *, step: int, tokens: int, stop: GracefulStop
    ) -> tuple[dict[str, Any] | None, str | None]:
        """lm_eval's results on rank 0, which are also in RUN_DIR/tasks/step_N.json, and on every
        rank what kept a task from being evaluated, or None; collective. The sequence length of the
        engine is to be set afterwards. What `stop` has received on any rank ends it, as a save may
        not wait for thousands of questions."""
        self._engine, self._stop, self._stop_asked = engine, stop, False
        try:
            return self._lead(lambda: self._evaluate_on_rank0(step=step, tokens=tokens))
        finally:
            self._engine = None

    def _lead(self, work: Callable[[], T]) -> tuple[T | None, str | None]:
        """Run `work` on rank 0, which the others follow; returns its result there, and its failure
        on every rank."""
        value: T | None = None
        failure: str | None = None
        if self._ranks.is_rank0:
            try:
                value = work()
            except Exception as error:  # of the code of a task, which may raise anything
                if self._scoring:
                    raise
                failure = self._described(error)
            self._ranks.broadcast(_End(failure))
            return value, failure
        while True:
            message: Any = self._ranks.broadcast(None)
            if isinstance(message, _End):
                return None, message.failure
            if isinstance(message, Part):
                self._score_part(message)
            self._advance("the tasks, which rank 0 leads")

    def _described(self, error: Exception) -> str:
        if isinstance(error, OSError) or is_ours(error):
            return one_line(error)
        return (
            f"evaluation.tasks={','.join(self.config.evaluation.tasks)}: {described(error)}; "
            "repair the task, or leave it out"
        )

    def _open_on_rank0(self) -> None:
        settings = self.config.evaluation
        require_lm_eval(settings.tasks, setting="evaluation.tasks")
        self._harness = load_harness()
        names = self._harness.Settings(
            tasks="evaluation.tasks",
            include_path="evaluation.include_path",
            num_fewshot="evaluation.num_fewshot",
            max_length="data.sequence_length",
        )
        self._tasks = self._harness.load_tasks(
            settings.tasks,
            include_path=None if settings.include_path is None else Path(settings.include_path),
            num_fewshot=settings.num_fewshot,
            settings=names,
        )
        self._lm = self._harness.ScoringLM(
            self._texts(),
            self._score,
            max_length=self.config.data.sequence_length,
            quiet=True,
            settings=names,
            on_text=self._show_life,
        )
        self._ask()

    def _texts(self) -> Texts:
        """As `models.evaluate` tokenizes them with a checkpoint of this run."""
        data = self.config.data
        spec = "bytes" if data.kind == "bytes" else data.tokenizer
        assert spec is not None, "the schema requires it"
        return texts_of(
            load_prompting(spec, TextRecord(**self.text._asdict())),
            known=self.text.bos_ids is not None,
            vocab_size=self.config.model.vocab_size,
            eod_setting="data.eod",
        )

    def _ask(self) -> dict[str, Any]:
        # Without bootstrapped errors, for which lm_eval forks a process for every core.
        limit = self.config.evaluation.task_limit
        found: dict[str, Any] = self._harness.run_tasks(
            self._lm, self._tasks, limit=limit, bootstrap_iters=0
        )
        return found

    def _evaluate_on_rank0(self, *, step: int, tokens: int) -> dict[str, Any]:
        results = self._ask()
        assert self._engine is not None
        results["manyformer"] = {
            "run_dir": self.config.run_dir,
            "step": step,
            "tokens": tokens,
            "family": self.config.model.family,
            "precision": str(self._engine.ctx.precision.dtype).removeprefix("torch."),
            "max_length": self.config.data.sequence_length,
            **self._lm.texts.described(),
        }
        path = Path(self.config.run_dir, TASKS_FOLDER, f"step_{step}.json")
        path.parent.mkdir(exist_ok=True)
        write_results(path, results)
        return results

    def _score(
        self, requests: Sequence[Request], *, progress: Callable[[int], object]
    ) -> list[Score]:
        """On rank 0: the scores of all requests, by all ranks; without an engine, invented ones."""
        check_requests(requests)
        if self._engine is None:
            return [Score(-float(request.num_scored), False) for request in requests]
        ctx = self._engine.ctx
        scores: list[Score | None] = [None] * len(requests)
        self._scoring = True
        for part in parts_of(
            requests,
            lengths=_lengths(self.config),
            round_size=self.config.training.batch_size * ctx.data.size,
            num_rounds=max(_BATCHES, _BATCHES_A_STAGE * ctx.pipeline.size),
        ):
            if self._stop_asked:
                self._scoring = False
                raise ValueError("the run is asked to stop; evaluate its checkpoint, or go on")
            self._send(part)
            for found in self._score_part(part):
                columns = (each.tolist() for each in found)
                for number, total, num_surprises in zip(*columns, strict=True):
                    scores[number] = Score(total, num_surprises == 0)
        self._scoring = False
        progress(len(requests))
        assert None not in scores, "every request is in a part"
        return [score for score in scores if score is not None]

    def _score_part(self, part: Part) -> list[Any]:
        """Score a part (collective); the scores of all data ranks on rank 0."""
        assert self._engine is not None
        own = self._engine.score_part(part, progress=self._advance)
        gathered = self._ranks.gather((own, self._stop.received)) or []
        self._stop_asked = any(received is not None for _, received in gathered)
        return [each for each, _ in gathered if each is not None]

    def _show_life(self) -> None:
        """Keep other ranks from waiting for rank 0 in vain."""
        if time.monotonic() - self._last_sign > _SECONDS:
            self._send(_Working())

    def _send(self, message: Part | _Working) -> None:
        self._advance("the tasks")
        self._ranks.broadcast(message)
        self._last_sign = time.monotonic()


def open_tasks(
    config: RunConfig, text: TextRules, ranks: RankGroup, advance: Callable[[str], object]
) -> TaskEvaluation | None:
    """The opened tasks of a run (collective); None without `evaluation.tasks`.

    Raises:
        AgreedError: on every rank; a task or a setting cannot be used.
    """
    if not config.evaluation.tasks:
        return None
    tasks = TaskEvaluation(config, text, ranks, advance)
    tasks.open()
    return tasks


def _lengths(config: RunConfig) -> list[int]:
    """Lengths of rows; compiled layers get one, as each other would be compiled anew."""
    lengths = [config.data.sequence_length]
    while not config.training.compile and lengths[-1] % (2 * _UNIT) == 0:
        lengths.append(lengths[-1] // 2)
    return lengths
