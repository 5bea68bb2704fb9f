"""Decoding steps with fixed buffers: the numbers of steps that grow, and one program for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from models import compiled_decoding
from models import generate as command
from models.base import TokenInputs, logits_of
from models.compiled_decoding import check_fixed_caches, compiled_steps
from models.generate import generate
from models.registry import family_names
from parallel.carry import SequentialModel
from parallel.context import ParallelContext
from tests.distributed import run_ranks
from tests.models.checkpoints import VOCAB_SIZE, config, model, write_checkpoint
from tests.models.families import CASES
from tests.refusals import assert_refused
from tests.tolerance import FP64

VARIANTS = {
    "llama": {},
    "qwen3": {"qk_norm": True, "qkv_bias": True},
    "olmo2": {"qk_norm": "all_heads", "norm_after": True},
    "window": {"sliding_window": 5},
    "gemma": {"activation": "gelu_tanh", "scale_embeddings": True, "zero_centered_gamma": True},
}


def _prompt(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCAB_SIZE, (rows, length), generator=generator)


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_a_step_with_fixed_buffers_has_the_logits_of_one_with_growing_ones(name):
    """In memory that was full of nan, and for prompts shorter and longer than a window."""
    decoder = model(config(**VARIANTS[name])).double()
    for length in (1, 9):
        tokens = _prompt(2, length + 12)
        growing, cache = (decoder.new_cache(2, 32) for _ in range(2))
        with torch.random.fork_rng():
            torch.use_deterministic_algorithms(True)  # which fills new memory with nan
            for each in (growing, cache):
                decoder(TokenInputs(tokens[:, :length]), each)
            torch.use_deterministic_algorithms(False)
        position = torch.tensor([length])
        fixed = {
            name: decoder.get_submodule(name).fixed_cache(each, position)
            for name, each in cache.items()
        }
        for column in range(length, length + 12):
            inputs = TokenInputs(tokens[:, column : column + 1])
            expected = logits_of(decoder(inputs, growing))
            torch.testing.assert_close(logits_of(decoder(inputs, fixed)), expected, **FP64)
            position += 1


def _assert_equal_tokens(decoder: SequentialModel, prompt: torch.Tensor, **settings) -> None:
    expected, rows = (
        generate(
            decoder,
            prompt,
            generator=torch.Generator().manual_seed(0),
            compiled=compiled,
            **settings,
        )
        for compiled in (False, True)
    )
    assert torch.equal(rows, expected)


def test_one_program_writes_the_tokens_of_eager_steps_in_every_call():
    torch._dynamo.reset()
    counters.clear()
    decoder = model(config(num_layers=2)).double()
    lengths = torch.tensor([3, 8])
    for settings in ({}, {"lengths": lengths}, {"temperature": 1.0, "top_k": 20}, {"eos_id": 7}):
        _assert_equal_tokens(decoder, _prompt(2, 8), max_new_tokens=20, **settings)
    for length in (1, 30):
        _assert_equal_tokens(decoder, _prompt(2, length), max_new_tokens=2 * length)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_more_programs_are_compiled_than_torch_does_of_one_function(monkeypatch):
    def traced(device_type: str) -> Callable[..., Any]:  # by dynamo, which has the limit
        return torch.compile(
            compiled_decoding._step, backend="eager", fullgraph=True, dynamic=False
        )

    monkeypatch.setattr(compiled_decoding, "_compiled", traced)
    torch._dynamo.reset()
    decoder = model(config(num_layers=1))
    for rows in range(1, torch._dynamo.config.recompile_limit + 2):
        _assert_equal_tokens(decoder, _prompt(rows, 4), max_new_tokens=3)


@pytest.mark.slow
def test_the_command_compiles_and_writes_the_same_text(tmp_path, capsys):
    write_checkpoint(tmp_path / "step_1", config())
    line = ["--checkpoint", str(tmp_path / "step_1"), "--prompt", "river", "--max-new-tokens", "20"]
    texts = []
    for more in ([], ["--compile"]):
        assert command.main([*line, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", [name for name in family_names() if name != "llama"])
def test_a_family_whose_state_has_no_fixed_shape_is_refused(name):
    family, settings = CASES[name]
    decoder = SequentialModel(family.layer_specs(settings), ParallelContext.single(device="meta"))
    with assert_refused("compiled", "True", "no fixed shape", "without it"):
        check_fixed_caches(decoder)


def _refused_on_two_ranks() -> None:
    ctx = ParallelContext.from_world(tensor=2)
    decoder = SequentialModel(CASES["llama"].family.layer_specs(config()), ctx, seed=0)
    with assert_refused("compiled", "True", "parallel.tensor=2", "in one process"):
        generate(decoder, _prompt(1, 3), max_new_tokens=2, compiled=True)


def test_tensor_ranks_are_refused():
    run_ranks(_refused_on_two_ranks, 2)


def test_a_cache_without_a_prompt_cannot_be_fixed():
    decoder = model(config())
    steps = compiled_steps(decoder, decoder.new_cache(1, 8), length=1)
    with assert_refused("cache", "empty", "", "append"), steps:
        pass
