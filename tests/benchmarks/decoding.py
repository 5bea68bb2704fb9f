"""Greedy decoding of a 125M llama, beside `generate` of transformers with either kind of cache, and
sampling of a wider mod beside llama, by `models.generate` and as a model of transformers.

All of a comparison have the same weights and prompts in this process, in turn, and write the same
tokens when they decode greedily, or it is void; mod and llama are other models of one shape. What
models without training write greedily repeats itself, while mod's thresholds are those of random
text: mod and llama are sampled at temperature 1, which is nearly random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor

from models.base import TokenInputs
from models.dynamic.cache import RaggedKVCache
from models.generate import generate
from models.llama.hf import HF
from models.registry import get_family
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.benchmarks.dynamic_step import BASELINE, NUM_LAYERS, VOCAB, Model, calibrate, models_of
from tests.benchmarks.timing import Table, interleaved, ratio
from tests.benchmarks.training import copy_weights, run_config, transformers_model

SIZE = Path(__file__).parents[2] / "configs" / "model" / "llama" / "125m.yaml"
PROMPT, NEW_TOKENS, BATCHES, ROUNDS = 32, 256, (1, 8), 3
OURS, STATIC, DYNAMIC = "manyformer", "transformers, static cache", "transformers, dynamic cache"
MOD, WIDTH = "mod 0.25", 1024
EXPORTED, PLAIN = "mod 0.25, exported", "llama of transformers"


def tables() -> Iterator[Table]:
    """Tokens/s of the 125M llama by the number of rows, and of one row of the wider models."""
    yield _llama()
    yield _mod()


def _llama() -> Table:
    values: dict[str, Any] = yaml.safe_load(SIZE.read_text())
    config = run_config(values, seq_length=PROMPT, batch_size=1)
    ctx = ParallelContext.single()
    ours = SequentialModel(get_family("llama").layer_specs(config.model), ctx, seed=0).eval()
    theirs: Any = transformers_model(config, device=ctx.device, dtype=torch.float32).eval()
    copy_weights(config, ours, theirs)
    rows = []
    for batch_size in BATCHES:
        shape = (batch_size, PROMPT)
        prompts = torch.randint(
            config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)
        )
        contestants = _contestants(ours, theirs, prompts)
        continued = {name: call() for name, call in contestants.items()}
        for name, tokens in continued.items():
            if not torch.equal(tokens, continued[OURS]):
                raise RuntimeError(f"{name} writes other tokens than {OURS}: no comparison")
        seconds = interleaved(contestants, rounds=ROUNDS, warmup=0)
        rows += [
            (
                str(batch_size),
                name,
                f"{batch_size * NEW_TOKENS / median(seconds[name]):.1f}",
                ratio(seconds, OURS, name),
            )
            for name in contestants
        ]
    title = f"Greedy decoding, llama/125m, fp32, {PROMPT} tokens continued by {NEW_TOKENS}"
    return Table(title, ("rows", "", "tokens/s", f"{OURS} over it"), rows)


def _mod() -> Table:
    from models.dynamic import MoDForCausalLM, MoDHFConfig

    models = models_of(WIDTH)
    for name in (BASELINE, MOD):
        calibrate(models[name])
    exported = MoDForCausalLM(MoDHFConfig.from_settings(models[MOD].config)).eval()
    exported.model.load_state_dict(models[MOD].layers.state_dict())
    plain = _transformers_llama(models[BASELINE])
    prompts = torch.randint(VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    ours = {
        name: partial(generate, models[name].layers, prompts, max_new_tokens=NEW_TOKENS)
        for name in (BASELINE, MOD)
    }
    theirs = {
        name: partial(model.generate, prompts, **_settings(prompts))
        for name, model in ((PLAIN, plain), (EXPORTED, exported))
    }
    for name, other in ((PLAIN, BASELINE), (EXPORTED, MOD)):
        if not torch.equal(theirs[name](), ours[other]()):
            raise RuntimeError(f"{name} writes other tokens than {other}: no comparison")
    draws = torch.Generator().manual_seed(0)
    contestants: dict[str, Callable[[], Tensor]] = {
        name: partial(each, temperature=1.0, generator=draws) for name, each in ours.items()
    }
    contestants |= {
        name: partial(each, do_sample=True, temperature=1.0, top_k=0)
        for name, each in theirs.items()
    }
    seconds = interleaved(contestants, rounds=ROUNDS, warmup=1)
    computed = {
        name: ""
        if name in (BASELINE, PLAIN)
        else f"{_computed(models[MOD].layers, contestants[name]()):.2f}"
        for name in contestants
    }
    rows = [
        (
            name,
            f"{NEW_TOKENS / median(seconds[name]):.1f}",
            ratio(seconds, name, BASELINE),
            ratio(seconds, name, PLAIN),
            computed[name],
        )
        for name in contestants
    ]
    title = f"Sampling of one row, {NUM_LAYERS} layers of {WIDTH}, fp32, tokens as above"
    return Table(
        title, ("", "tokens/s", f"over {BASELINE}", f"over {PLAIN}", "chosen tokens"), rows
    )


def _transformers_llama(model: Model) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    contents = HF.to_config(model.config)
    config = AutoConfig.for_model(contents.pop("model_type"), **contents)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    names = HF.names(model.config)
    theirs.load_state_dict({names[n]: p for n, p in model.layers.named_parameters()})
    return theirs


@torch.no_grad()
def _computed(layers: SequentialModel, tokens: Tensor) -> float:
    """The share of the tokens after the prompt that a layer which chooses has computed."""
    cache = layers.new_cache(1, tokens.shape[1])
    counts = []
    for part in tokens.tensor_split([PROMPT], dim=1):
        layers(TokenInputs(part), cache)
        ragged = [each for each in cache.values() if isinstance(each, RaggedKVCache)]
        counts.append(sum(int(each.counts) for each in ragged) / len(ragged))
    return (counts[1] - counts[0]) / (tokens.shape[1] - PROMPT)


def _contestants(
    ours: SequentialModel, theirs: Any, prompts: Tensor
) -> dict[str, Callable[[], Tensor]]:
    settings = _settings(prompts)
    return {
        OURS: partial(generate, ours, prompts, max_new_tokens=NEW_TOKENS),
        STATIC: partial(theirs.generate, prompts, cache_implementation="static", **settings),
        DYNAMIC: partial(theirs.generate, prompts, **settings),
    }


def _settings(prompts: Tensor) -> dict[str, Any]:
    return {
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
        "disable_compile": True,
    }
