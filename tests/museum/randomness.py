"""Initial weights, dropout, and state that layers learn beside their parameters."""

from __future__ import annotations

from tests.faults.mutation import Mutant
from tests.museum.exhibit import Exhibit, Source, proof_of

_CONTRACT = "tests/models/test_contract.py::test_"
_ANY_LAYOUT = (
    "tests/pretrain/engine/test_engine.py"
    "::test_a_run_at_any_layout_equals_a_plain_torch_loop[pipeline 2]"
)
_DARIA = "tests/pretrain/layouts/test_daria_former_run.py::test_a_run_is_the_same_at_any_layout"
_DYNAMIC = (
    "tests/pretrain/layouts/test_dynamic_run.py"
    "::test_a_run_is_the_same_at_any_layout_and_so_are_its_thresholds"
)

RANDOMNESS = {
    "stages begin alike": Exhibit(
        Source(
            "pytorch/pytorch",
            139304,
            "every pipeline stage would begin from one state of the generator, and stages get the "
            "same weights",
        ),
        Mutant(
            "parallel.carry:build_layers",
            "initialize(layer, seed=seed, prefix=spec.name, tensor_rank=ctx.tensor.rank,"
            " expert_rank=ctx.expert.rank, names=dict(spec.tied))",
            "initialize(layer, seed=seed, prefix=str(len(layers)), tensor_rank=ctx.tensor.rank,"
            " expert_rank=ctx.expert.rank, names=dict(spec.tied))",
            (_ANY_LAYOUT,),
        ),
        proof_of("llama/demo", "parallel.pipeline=2"),
    ),
    "tensor ranks begin alike": Exhibit(
        Source(
            "InternLM/InternLM",
            405,
            "tensor ranks shared a seed, and so the shards of a matrix were copies of each other",
        ),
        Mutant(
            "parallel.random:_local_rows",
            "min(tensor_rank * extent, full_size)",
            "0",
            (
                "tests/parallel/test_layers.py"
                "::test_the_same_seed_gives_the_same_full_weights_at_any_tensor_size",
            ),
        ),
        proof_of("llama/demo", "parallel.tensor=2"),
    ),
    "data ranks drop the same elements": Exhibit(
        Source(
            "huggingface/transformers",
            31412,
            "one seed for all ranks made the dropout masks of data ranks the same",
        ),
        Mutant(
            "models.common.counter_rng:dropout",
            "uniform(keys, x.shape[-1], stream=stream, first=first)",
            "torch.rand_like(x)",
            (f"{_DARIA}[data 2, ZeRO-3]",),
        ),
        proof_of("daria_former/demo", "model.dropout=0.1"),
        case="daria_former",
    ),
    "tensor ranks drop other elements of one tensor": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            206,
            "generators of tensor ranks went out of step, and dropout of replicated activations "
            "differed between them",
        ),
        Mutant(
            "models.daria_former.layers:DACBlock._dropped",
            "local_sequence(carry.keys.T, ctx=self.ctx)",
            "local_sequence(carry.keys.T, ctx=self.ctx) + self.ctx.tensor.rank",
            (
                f"{_CONTRACT}two_tensor_ranks_equal_one_in_loss_and_every_gradient[False-daria_former]",
            ),
        ),
        proof_of("daria_former/demo", "model.dropout=0.1", "parallel.tensor=2"),
        case="daria_former",
    ),
    "training goes on in evaluation mode": Exhibit(
        Source(
            "wkentaro/pytorch-fcn",
            56,
            "a validation inside an epoch left the model in evaluation mode",
        ),
        Mutant(
            "pretrain.engine.engine:PlainEngine._evaluate",
            "self._deepspeed.train()",
            "None",
            ("tests/pretrain/layouts/test_daria_former_run.py",),
        ),
        proof_of("daria_former/demo", "model.dropout=0.1"),
        case="daria_former",
    ),
    "evaluation draws from the generators of training": Exhibit(
        Source(
            "karpathy/char-rnn",
            17,
            "how often a run was validated changed what it learnt, with the same seed",
        ),
        Mutant(
            "pretrain.engine.engine:PlainEngine._evaluate",
            "self._deepspeed.eval()",
            "self._deepspeed.eval(); torch.rand(1)",
            (),
        ),
        proof_of("llama/demo"),
    ),
    "a data rank learns a threshold of its own": Exhibit(
        Source(
            "pytorch/torchtitan",
            4154,
            "the counts from which routing biases are updated were not summed over all ranks",
        ),
        Mutant(
            "parallel.layer_state:update_layer_states",
            "if ctx.data.size > 1: ...",
            "if False: ...",
            (f"{_DYNAMIC}[data 2, ZeRO-3]",),
        ),
        proof_of("mod/demo"),
        case="mod",
    ),
    "thresholds move in every micro-batch": Exhibit(
        Source(
            "pytorch/torchtitan",
            1304,
            "routing biases were updated in every micro-batch of an accumulated step",
        ),
        Mutant(
            "pretrain.engine.engine:PlainEngine.train_step",
            "engine.backward(total)",
            "engine.backward(total); update_layer_states(self._layer_states, ctx=self.ctx)",
            (f"{_DYNAMIC}[accumulation 4]",),
        ),
        proof_of("mod/demo", "training.gradient_accumulation_steps=2", ranks=1),
        case="mod",
    ),
}
