"""A model of ours as one of lm_eval's (EleutherAI's evaluation harness), and its tasks.

Texts become tokens, and long ones windows, as lm_eval's own backend for transformers does with an
exported model, so that both give the same numbers. Importing this module needs lm_eval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from models.evaluation.decoding import continue_prompts
from models.evaluation.scoring import Request, Score, score
from models.evaluation.surroundings import bars, seeded
from models.evaluation.task_errors import broken_file, described
from models.evaluation.texts import Texts
from parallel.carry import SequentialModel

# lm_eval's default of new tokens where a task names none.
MAX_NEW_TOKENS = 256
# Settings of a task's generation that are known here; `num_beams` 1 is no beam search.
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "num_beams"}


class Settings(NamedTuple):
    """Names of the settings that a message asks to change: of the command line, or of a run."""

    tasks: str = "--tasks"
    include_path: str = "--include-path"
    num_fewshot: str = "--num-fewshot"
    max_length: str = "--max-length"


ON_THE_COMMAND_LINE = Settings()


class Scorer(Protocol):
    """`models.evaluation.scoring.score` with a model."""

    def __call__(
        self, requests: Sequence[Request], *, progress: Callable[[int], object]
    ) -> list[Score]: ...


class ScoringLM(TemplateLM):
    """A model that scores texts and does not generate any.

    `max_length`: tokens that the model sees at most. Contexts are cut from the left to fit.
    `on_text` is called for every text that is encoded.
    """

    def __init__(
        self,
        texts: Texts,
        scorer: Scorer,
        *,
        max_length: int,
        quiet: bool = False,
        settings: Settings = ON_THE_COMMAND_LINE,
        on_text: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self.texts, self.scorer, self.max_length = texts, scorer, max_length
        self.quiet, self.settings, self.on_text = quiet, settings, on_text

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a document."""
        return self.texts.prompting.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has none before it."""
        return self.texts.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, by default with the begin tokens of training."""
        self.on_text()
        return self.texts.encode(string, begin=add_special_tokens is not False)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Score]:
        """Log-likelihood of each continuation given its context, and whether it is greedy."""
        pairs = [request.args for request in requests]
        return self._loglikelihood_tokens(
            [((context, text), *self._tokens_of(context, text)) for context, text in pairs],
            disable_tqdm=disable_tqdm,
        )

    def _tokens_of(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation, False)
        if not before:  # also where white space alone goes to the continuation
            before = [self.prefix_token_id]
            if after[:1] == before:  # the text brings the prefix
                after = after[1:]
        if not after:
            raise ValueError(
                f"the continuation {continuation!r} of {context[-40:]!r} adds no token to it; "
                "repair the task, whose continuations must begin with the space before them"
            )
        return before, after

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Score]:
        cut = []
        for _, before, after in requests:
            if len(after) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(after)} tokens, the model sees max_length="
                    f"{self.max_length}; raise {self.settings.max_length} or leave the task out"
                )
            cut.append(Request((before + after)[-(self.max_length + 1) :], len(after)))
        with self._progress(len(cut), "scoring", disable=disable_tqdm) as progress:
            return self.scorer(cut, progress=progress)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of `max_length` that score each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, found in zip(owners, scores, strict=True):
            totals[number] += found.log_likelihood
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Raises ValueError: nothing generates."""
        names = ", ".join(sorted({request.task_name or "a task" for request in requests}))
        raise ValueError(
            f"{self.settings.tasks}: {names} asks for generated text (output_type generate_until), "
            "and a model in training only scores texts; leave the task out, and run python -m "
            "models.evaluate with a checkpoint"
        )

    @contextmanager
    def _progress(
        self, total: int, what: str, *, disable: bool
    ) -> Iterator[Callable[[int], object]]:
        with tqdm(total=total, desc=what, disable=disable or self.quiet) as bar:
            yield bar.update


class CheckpointLM(ScoringLM):
    """A model of any family, in this process, that also generates."""

    def __init__(
        self,
        model: SequentialModel,
        texts: Texts,
        *,
        max_length: int,
        batch_size: int,
        seed: int = DEFAULT_OTHER_SEED,
        quiet: bool = False,
    ) -> None:
        scorer = partial(score, model, batch_size=batch_size)
        super().__init__(texts, scorer, max_length=max_length, quiet=quiet)
        self.model, self.batch_size = model, batch_size
        self._device = model.ctx.device
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings, its length or the end token."""
        tasks = [self._generation(*request.args) for request in requests]
        # Like settings together, and prompts of like length.
        order = sorted(range(len(tasks)), key=lambda i: (tasks[i].key, -len(tasks[i].prompt)))
        texts = [""] * len(tasks)
        with self._progress(len(tasks), "generating", disable=disable_tqdm) as progress:
            for batch in _batches(order, lambda i: tasks[i].key, self.batch_size):
                settings = tasks[batch[0]]
                rows = continue_prompts(
                    self.model,
                    [tasks[i].prompt for i in batch],
                    max_new_tokens=settings.max_new_tokens,
                    end_ids=self.texts.end_ids,
                    is_complete=Stop(settings.until, self.texts.decode),
                    generator=self._generator,
                    **settings.sampling,
                )
                for number, row in zip(batch, rows, strict=True):
                    text = self.texts.decode(row)
                    texts[number] = postprocess_generated_text(text, settings.until, None)
                progress(len(batch))
        return texts

    def _generation(self, context: str, given: Mapping[str, Any]) -> _Generation:
        settings = dict(normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS))
        unknown = sorted(settings.keys() - _GENERATION)
        if unknown or settings.get("num_beams", 1) != 1:
            name = unknown[0] if unknown else "num_beams"
            raise ValueError(
                f"generation_kwargs: {name}={settings[name]!r} of a task is not supported; known "
                "are until, max_gen_toks, do_sample, temperature, top_k and top_p: leave the task "
                "out, or evaluate an export with lm_eval's hf backend"
            )
        max_new_tokens = settings["max_gen_toks"]
        room = self.max_length - max_new_tokens
        if max_new_tokens < 1 or room < 1:
            raise ValueError(
                f"max_gen_toks={max_new_tokens} of a task must be 1 or more and leave room for a "
                f"prompt in max_length={self.max_length}; raise {self.settings.max_length} or "
                "leave the task out"
            )
        for stop in settings["until"]:
            if not isinstance(stop, str):
                raise ValueError(
                    f"until: {stop!r} of a task must be a string; write it in quotation marks"
                )
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        until = [stop for stop in (*settings["until"], self.texts.end_text) if stop]
        sampling: dict[str, Any] = {}
        if settings["do_sample"] and settings.get("temperature", 1.0) > 0.0:
            sampling = {k: settings[k] for k in ("top_k", "top_p") if settings.get(k)}
            sampling["temperature"] = settings.get("temperature", 1.0)
        return _Generation(prompt, max_new_tokens, until, sampling)


class _Generation(NamedTuple):
    """One prompt and its settings."""

    prompt: list[int]
    max_new_tokens: int
    until: list[str]
    sampling: dict[str, Any]

    @property
    def key(self) -> str:
        """The settings, alike for all rows of a batch."""
        return repr(self[1:])


class Stop:
    """Whether new tokens spell a stop string.

    The whole text is decoded only when its newest tokens may hold one: every token but a special
    one is a byte or more, and the first of some tokenizers loses its space.
    """

    def __init__(self, until: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self.until, self.decode = until, decode
        self.reach = 2 + max((len(stop.encode()) for stop in until), default=0)

    def __call__(self, tokens: Sequence[int]) -> bool:
        tail = tokens[-self.reach :]
        return self._is_in(tail) and (len(tail) == len(tokens) or self._is_in(tokens))

    def _is_in(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens)
        return any(stop in text for stop in self.until)


def _batches(
    order: Sequence[int], key: Callable[[int], str], batch_size: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) == batch_size or key(batch[0]) != key(number)):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def load_tasks(
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    settings: Settings = ON_THE_COMMAND_LINE,
) -> dict[str, Any]:
    """Load tasks of `include_path`, or else of lm_eval too, by name or pattern.

    lm_eval's own tasks are 14,000 files: they are looked through only for a name that the folder
    does not have. `num_fewshot`: examples before each question, except for tasks that fix 0.

    Raises:
        ValueError: there is no such task, or its data cannot be loaded.
    """
    manager = None
    if include_path is not None:
        if not include_path.is_dir():
            raise ValueError(
                f"{settings.include_path} {include_path}: no such folder; give one with task files"
            )
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if manager is None or _missing(manager, names):
        manager = TaskManager(include_path=include_path)
    if missing := _missing(manager, names):
        if include_path is not None and (broken := broken_file(include_path)) is not None:
            raise ValueError(
                f"{settings.tasks} {','.join(missing)}: no such task, but in "
                f"{settings.include_path} {broken}; repair this file, or name other tasks"
            )
        raise ValueError(
            f"{settings.tasks} {','.join(missing)}: no such task among {len(manager.all_tasks)}; "
            f"`lm_eval ls tasks` lists them, and {settings.include_path} adds a folder of your own"
        )
    try:
        with seeded():
            loaded: dict[str, Any] = manager.load(manager.match_tasks(list(names)))
    except Exception as error:  # of a task's code, or of the package that loads its data
        raise ValueError(
            f"{settings.tasks} {','.join(names)}: {described(error)}; repair the task, or get its "
            "data where there is a network"
        ) from error
    for task in loaded["tasks"].values():
        _set_fewshot(task, num_fewshot, settings)
    return loaded


def _missing(manager: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def _set_fewshot(task: Any, number: int | None, settings: Settings) -> None:
    default = task.get_config("num_fewshot")
    if number is not None and default != 0:
        task.set_config(key="num_fewshot", value=number)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    _check_fewshot(task, settings)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _check_fewshot(task: Any, settings: Settings) -> None:
    """Raises ValueError: the task has fewer examples than it would put before a question."""
    number, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not number or sampler is None:
        return
    # Of the split that is evaluated an example is never the question itself.
    is_own = task.fewshot_cfg.split == task.config.test_split
    available = max(len(sampler.fewshot_docs()) - is_own, 0)
    if number > available:
        raise ValueError(
            f"num_fewshot={number} of task {task.config.task}: it has {available} examples beside "
            f"a question; lower it with {settings.num_fewshot}"
        )


def run_tasks(
    model: ScoringLM,
    tasks: dict[str, Any],
    *,
    limit: float | None = None,
    bootstrap_iters: int = 100_000,
    log_samples: bool = False,
) -> dict[str, Any]:
    """The results of lm_eval's `evaluate` for loaded tasks.

    `limit`: questions of a task, or below 1 their share. `log_samples`: keep every question and
    answer.
    """
    with seeded(), bars(shown=not model.quiet):
        found: dict[str, Any] = evaluate(
            model, tasks, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=log_samples
        )
    return found
