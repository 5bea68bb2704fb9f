"""Memory across layers, injected into pretrained models: is it used after a fine-tune?

*Causal*: a Llama of transformers in the size of the demo, trained here on bytes. *Masked*: a BERT,
with `--model FOLDER`, on the docstrings of Python's standard library, 15 % of the tokens masked.
The package that RESULTS.md names holds the encoder alone, so that it is first trained to fill masks
with a new head. Both are then fine-tuned, from the same weights in every arm. Afterwards W_m is set
to 0, which leaves out what the memory adds and nothing else.
"""

from __future__ import annotations

import ast
import copy
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data_tools.demo_corpus import standard_library_modules
from models.amrpa import AMRPAConfig, get_amrpa_metrics, inject_amrpa
from tests.benchmarks.timing import Table
from tests.evidence.language import LENGTH, VOCAB, Corpus, batches, rows_at
from tests.evidence.training import IGNORED, over_seeds, schedule

# What is trained in each arm of a fine-tune.
ARMS = ("memory alone", "everything", "everything, no memory")

LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}
MASKED_ROWS, MASKED_LENGTH, MASKED_SHARE = 4, 64, 0.15

Inputs = dict[str, Tensor]


class Rates(NamedTuple):
    """Learning rates of the memory and of all other parameters."""

    memory: float
    rest: float


class Task(NamedTuple):
    """`draw(seed)`: batches without end. `test`: batches that are not drawn."""

    title: str
    draw: Callable[[int], Iterator[Inputs]]
    test: list[Inputs]
    base_steps: int
    base_lr: float
    steps: int
    rates: Rates
    memory: AMRPAConfig


def causal_task(corpus: Corpus, *, base_steps: int = 120, steps: int = 30, rows: int = 48) -> Task:
    """Bytes of source text."""

    def draw(seed: int) -> Iterator[Inputs]:
        for batch in batches(corpus.train, seed=seed):
            yield {"input_ids": batch.tokens[:4], "labels": batch.tokens[:4]}

    places = torch.linspace(0, len(corpus.test) - LENGTH - 1, rows).long()
    tests = [rows_at(corpus.test, part).tokens for part in places.split(4)]
    return Task(
        "A llama of the demo's size, bits per byte",
        draw,
        [{"input_ids": tokens, "labels": tokens} for tokens in tests],
        base_steps,
        4e-3,
        steps,
        Rates(1e-2, 1e-3),
        AMRPAConfig(target_layers="last_2", alpha_mlp_hidden=64, dropout=0.0),
    )


class Tokens(NamedTuple):
    """Token ids int64 [n] to train on and to score, and the ids that rows are made with."""

    train: Tensor
    test: Tensor
    first: int
    last: int
    mask: int


def docstrings(tokenizer: Any) -> Tokens:
    """Those of the standard library's modules; one module of 20 is scored."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    for number, module in enumerate(standard_library_modules()):
        for node in ast.walk(ast.parse(module.text)):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                parts[number % 20 == 0].append(text)
    test, train = (
        torch.tensor([i for ids in _ids(tokenizer, parts[held_out]) for i in ids])
        for held_out in (True, False)
    )
    ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
    return Tokens(train, test, *ids)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def masked_task(tokens: Tokens, *, base_steps: int = 50, steps: int = 20, rows: int = 32) -> Task:
    """Masked tokens of docstrings; the masks of the test are the same for all."""

    def masked(text: Tensor, places: Tensor, generator: torch.Generator) -> Inputs:
        inner = text[places.unsqueeze(1) + torch.arange(MASKED_LENGTH - 2)]
        ends = inner.new_tensor([tokens.first, tokens.last]).expand(len(inner), 2)
        ids = torch.cat((ends[:, :1], inner, ends[:, 1:]), dim=1)
        chosen = torch.rand(ids.shape, generator=generator) < MASKED_SHARE
        chosen[:, 0], chosen[:, -1], chosen[:, 1] = False, False, True  # one at least
        hidden = ids.masked_fill(chosen, tokens.mask)
        return {"input_ids": hidden, "labels": ids.masked_fill(~chosen, IGNORED)}

    def draw(seed: int) -> Iterator[Inputs]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            last = len(tokens.train) - MASKED_LENGTH
            places = torch.randint(last, (MASKED_ROWS,), generator=generator)
            yield masked(tokens.train, places, generator)

    generator = torch.Generator().manual_seed(0)
    places = torch.linspace(0, len(tokens.test) - MASKED_LENGTH - 1, rows).long()
    return Task(
        "A BERT, bits per masked token",
        draw,
        [masked(tokens.test, part, generator) for part in places.split(4)],
        base_steps,
        3e-4,
        steps,
        Rates(5e-3, 1e-4),
        AMRPAConfig(),
    )


def train(model: Any, source: Iterator[Inputs], *, steps: int, rates: Rates) -> None:
    """AdamW with the schedule of the other studies and clipping at 1, in place."""
    model.train()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".amrpa." in name].append(parameter)
    peaks = {True: rates.memory, False: rates.rest}
    optimizer = torch.optim.AdamW(
        [{"params": ps, "lr": peaks[memory]} for memory, ps in groups.items() if ps],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for _ in range(steps):
        model(**next(source)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out(model: Any, task: Task) -> list[float]:
    """Bits per scored token of every batch of the test."""
    return [float(model(**inputs).loss) / math.log(2) for inputs in task.test]


def base_llama(task: Task, *, seed: int = 0, **settings: float) -> Any:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | settings))
    train(model, task.draw(seed), steps=task.base_steps, rates=Rates(0.0, task.base_lr))
    return model


def base_bert(folder: Path, task: Task, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_pretrained(folder)
    train(model, task.draw(seed), steps=task.base_steps, rates=Rates(0.0, task.base_lr))
    return model


class Tuned(NamedTuple):
    """Bits per scored token after the fine-tune, and with W_m set to 0; the standard error of the
    difference over batches of the test; the mean gate."""

    bits: float
    without: float
    error: float
    gate: float


def tune(base: Any, arm: str, task: Task, *, seed: int) -> Tuned:
    """Fine-tune a copy of `base` on rows that it has not been trained on."""
    model = copy.deepcopy(base)
    torch.manual_seed(1000 + seed)
    if arm != "everything, no memory":
        frozen = arm != "everything"
        changes = {"freeze_base_model": frozen, "freeze_embeddings": frozen}
        inject_amrpa(model, AMRPAConfig.from_dict(task.memory.to_dict() | changes))
    if arm == "memory alone":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".amrpa." in name)
    train(model, task.draw(1000 + seed), steps=task.steps, rates=task.rates)
    bits = held_out(model, task)
    if arm == "everything, no memory":
        return Tuned(statistics.fmean(bits), statistics.fmean(bits), 0.0, 0.0)
    gate = float(get_amrpa_metrics(model)["gate_impact"].mean())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("memory_weight"):
                parameter.zero_()
    without = held_out(model, task)
    changes_of_batches = [b - a for a, b in zip(bits, without, strict=True)]
    error = statistics.stdev(changes_of_batches) / math.sqrt(len(bits))
    return Tuned(statistics.fmean(bits), statistics.fmean(without), error, gate)


def table(base: Any, task: Task, num_seeds: int) -> Table:
    """Every arm of a fine-tune, over seeds of its rows and of the memory's first weights."""
    before = statistics.fmean(held_out(base, task))
    rows: list[tuple[str, ...]] = [("before", f"{before:.3f}", "-", "-", "-", "-")]
    for arm in ARMS:
        found = [tune(base, arm, task, seed=seed) for seed in range(num_seeds)]
        print(f"{arm}: {found}", flush=True)
        own = over_seeds([each.bits for each in found])
        if arm == ARMS[-1]:
            rows.append((arm, own, "-", "-", "-", "-"))
            continue
        rows.append(
            (
                arm,
                own,
                over_seeds([each.without for each in found]),
                over_seeds([each.without - each.bits for each in found], digits=4),
                f"{max(each.error for each in found):.4f}",
                over_seeds([each.gate for each in found]),
            )
        )
    header = (
        "trained", "bits", "with W_m = 0", "what zeroing costs", "its s.e. at most", "mean gate",
    )  # fmt: skip
    return Table(f"{task.title}; {task.steps} steps", header, rows)


def tables(
    num_seeds: int, *, steps: int | None = None, model: Path | None = None
) -> Iterator[Table]:
    """The causal model, and the masked one if its folder is given.

    `steps` of both fine-tunes replaces the short ones of RESULTS.md; the models are then trained
    four and ten times as long before.
    """
    corpus = Corpus.of_the_library()
    longer = {} if steps is None else {"steps": steps, "base_steps": 4 * steps}
    causal = causal_task(corpus, **longer)
    yield table(base_llama(causal), causal, num_seeds)
    if model is None:
        print("no --model: the masked model is left out", flush=True)
        return
    longer = {} if steps is None else {"steps": steps, "base_steps": 10 * steps}
    masked = masked_task(docstrings(AutoTokenizer.from_pretrained(model)), **longer)
    yield table(base_bert(model, masked), masked, num_seeds)
