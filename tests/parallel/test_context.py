"""The layout: rank order, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

import parallel.megatron  # noqa: F401  its warnings are those of an import, not of a test
from parallel.context import ParallelContext
from parallel.precision import Precision
from tests.distributed import run_ranks
from tests.refusals import assert_refused


def _coordinates():
    ctx = ParallelContext.from_world(tensor=2, pipeline=2)
    return ctx.pipeline.rank, ctx.data.rank, ctx.tensor.rank, ctx.is_main


def test_ranks_are_ordered_as_in_deepspeed_s_topology():
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    for rank, (pipeline, data, tensor, is_main) in enumerate(run_ranks(_coordinates, 8)):
        assert topology.get_coord(rank) == (pipeline, data, tensor)
        assert is_main == (rank == 0)


def _megatron_agrees():
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2
    )
    ctx = ParallelContext.from_world(tensor=2, pipeline=2)
    return (
        parallel_state.get_tensor_model_parallel_rank() == ctx.tensor.rank
        and parallel_state.get_pipeline_model_parallel_rank() == ctx.pipeline.rank
        and parallel_state.get_data_parallel_rank() == ctx.data.rank
    )


def test_ranks_are_ordered_as_in_megatron_core():
    assert all(run_ranks(_megatron_agrees, 4))


def _expert_ranks():
    ctx = ParallelContext.from_world(tensor=2, expert=2)
    members = (torch.distributed.get_process_group_ranks(a.group) for a in (ctx.expert, ctx.data))
    same = torch.distributed.get_process_group_ranks(ctx.expert_data.group)
    return ctx.data.rank, ctx.expert.rank, ctx.expert_data.rank, *members, same


def test_expert_ranks_are_neighbours_inside_the_data_axis():
    everyone = run_ranks(_expert_ranks, 8)
    assert everyone[6] == (3, 1, 1, [4, 6], [0, 2, 4, 6], [2, 6])
    assert everyone[1] == (0, 0, 0, [1, 3], [1, 3, 5, 7], [1, 5])


def _layout_that_does_not_divide():
    with assert_refused(
        "parallel.tensor", value=4, constraint=("parallel.pipeline=1", "2"), remedy="multiple of 4"
    ):
        ParallelContext.from_world(tensor=4)
    with assert_refused("parallel.expert", value=2, constraint="data size 1", remedy="expert size"):
        ParallelContext.from_world(tensor=2, expert=2)
    with assert_refused(
        "sequence_parallel",
        value=True,
        constraint="tensor size 1",
        remedy=("parallel.sequence_parallel=false", "parallel.tensor"),
    ):
        ParallelContext.from_world(sequence_parallel=True)


def test_a_layout_that_cannot_be_is_refused_with_its_numbers():
    run_ranks(_layout_that_does_not_divide, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA may have Transformer Engine")
def test_fp8_without_transformer_engine_is_an_error_that_says_what_to_install():
    with assert_refused(
        "precision",
        value="fp8",
        constraint=("CUDA", "Transformer Engine"),
        remedy=("manyformer[fp8]", "fp8_backend=emulated", "precision=bf16"),
    ):
        Precision("fp8", "delayed")


def test_an_fp8_recipe_without_fp8_is_refused_because_it_has_no_effect():
    with assert_refused(
        "fp8_recipe", value="'delayed'", constraint="precision='bf16'", remedy="both"
    ):
        Precision("bf16", "delayed")


def test_an_emulation_without_what_a_recipe_needs_is_refused():
    with assert_refused(
        "fp8_backend", value="'emulated'", constraint="'delayed'", remedy=("use", "tensorwise")
    ):
        Precision("fp8", "delayed", "emulated")
    with assert_refused("fp8_backend", value="'cutlass'", constraint="unknown", remedy="emulated"):
        Precision("fp8", "tensorwise", "cutlass")


def test_a_single_process_imports_neither_megatron_nor_deepspeed():
    import subprocess

    code = (
        "import sys, parallel.context, parallel.layers, parallel.carry, parallel.wire;"
        "parallel.context.ParallelContext.single();"
        "print([m for m in ('megatron', 'deepspeed', 'transformer_engine') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"
