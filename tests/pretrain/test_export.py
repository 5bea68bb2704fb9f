"""Export of a run over several ranks, to text and to transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parallel.megatron
import parallel.pipeline  # noqa: F401  imported once here, not in every forked rank
from models.base import TokenInputs
from models.checkpoint import load_model, open_checkpoint
from models.convert import main as convert
from parallel.checkpoint.manifest import TextRecord
from parallel.checkpoint.weights_reader import ShardedWeightsReader
from tests.distributed import run_ranks
from tests.pretrain.run_training import run_training
from tests.pretrain.tiny_run import VOCAB, metrics, tiny_run, write_data
from tests.tolerance import FP32_LOSS

LAYOUTS = {
    "whole": (1, "zero1", {}),
    "pipeline 2 x tensor 2": (4, "zero1", {"parallel__pipeline": 2, "parallel__tensor": 2}),
    "data 2, ZeRO-3": (2, "zero3", {"training__batch_size": 2}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The run directory of the same training at each layout, and `data` of the corpus."""
    data = tmp_path_factory.mktemp("data")
    write_data(data)
    directories = {"data": data}
    for name, (world_size, stage, changes) in LAYOUTS.items():
        config = tiny_run(
            data,
            run_dir=str(tmp_path_factory.mktemp("run") / "run"),
            model__tie_embeddings=True,
            model__qkv_bias=True,
            **changes,
        )
        run_ranks(run_training, world_size, config, f"configs/ds/{stage}.json", init=False)
        directories[name] = Path(config.run_dir)
    return directories


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_checkpoints_of_every_layout_hold_the_same_full_weights(layout, runs):
    whole, cut = ShardedWeightsReader(runs["whole"]), ShardedWeightsReader(runs[layout])
    assert set(whole.names()) == set(cut.names())
    for name in whole.names():
        # Four steps of Adam at 1e-2 turn rounding of a tiny gradient into up to 1e-4 of a weight.
        torch.testing.assert_close(cut.full(name), whole.full(name), rtol=1e-3, atol=1e-4)


def test_a_checkpoint_says_how_the_text_of_its_data_became_tokens(runs):
    assert open_checkpoint(runs["whole"]).text == TextRecord(
        eod_id=None, bos_ids=(), special_tokens="plain"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exported_checkpoint_gives_the_same_logits_in_transformers(layout, runs, tmp_path):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "exported"
    arguments = ["to-hf", "--checkpoint", str(runs[layout]), "--output", str(output)]
    assert convert([*arguments, "--no-tokenizer"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float64)
    assert type(theirs).__name__ == "Qwen2ForCausalLM"
    ours = load_model(open_checkpoint(runs[layout]), device="cpu").double()
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(TokenInputs(tokens)).transpose(0, 1)
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("world_size", "stage", "changes"),
    [
        (1, "zero1", {}),
        (2, "zero3", {"training__batch_size": 2}),
        (4, "zero1", {"parallel__pipeline": 2, "parallel__tensor": 2}),
    ],
    ids=["one process", "data 2, ZeRO-3", "pipeline 2 x tensor 2"],
)
def test_training_begins_with_imported_weights_at_any_layout(
    world_size, stage, changes, runs, tmp_path
):
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    arguments = ["to-hf", "--checkpoint", str(runs["whole"]), "--output", str(exported)]
    assert convert([*arguments, "--no-tokenizer"]) == 0
    assert convert(["from-hf", "--model", str(exported), "--output", str(imported)]) == 0
    common = {
        "model__tie_embeddings": True,
        "model__qkv_bias": True,
        "training__init_from": str(imported),
        "training__lr": 1e-12,
        **changes,
    }
    config = tiny_run(runs["data"], run_dir=str(tmp_path / "run"), **common)
    run_ranks(run_training, world_size, config, f"configs/ds/{stage}.json", init=False)
    before = metrics(tiny_run(runs["data"], run_dir=str(runs["whole"])))[1][-1]["eval_loss"]
    after = metrics(config)[1][-1]["eval_loss"]  # a learning rate of 1e-12 changes nothing
    assert after == pytest.approx(before, rel=FP32_LOSS)


def test_weights_of_another_model_are_refused_by_name_and_shape(runs, tmp_path):
    config = tiny_run(
        runs["data"],
        run_dir=str(tmp_path / "run"),
        model__intermediate_size=96,
        model__qkv_bias=True,
        model__tie_embeddings=True,
        training__init_from=str(runs["whole"]),
    )
    with pytest.raises(AssertionError, match=r"block_0\.mlp\.\w+\.weight .*shape"):
        run_ranks(run_training, 1, config, init=False)
