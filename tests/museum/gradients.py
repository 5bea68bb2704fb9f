"""Gradients and losses that depend on the layout."""

from __future__ import annotations

from tests.faults.mutation import Mutant
from tests.museum.exhibit import Exhibit, Source, proof_of

_CONTRACT = "tests/models/test_contract.py::test_"
_TENSOR_RANKS = f"{_CONTRACT}two_tensor_ranks_equal_one_in_loss_and_every_gradient"
_ENGINE = "tests/pretrain/engine/test_engine.py::test_"
_ANY_LAYOUT = f"{_ENGINE}a_run_at_any_layout_equals_a_plain_torch_loop"
_EXPERTS = "tests/pretrain/engine/test_deepspeed_moe.py::test_"
_DYNAMIC = "tests/models/dynamic/test_layouts.py::test_"
_MASKED = (
    "tests/pretrain/layouts/test_masked_loss.py"
    "::test_a_step_with_masked_labels_is_the_same_at_every_cut"
)

GRADIENTS = {
    "accumulation scales gradients once per stage": Exhibit(
        Source(
            "deepspeedai/DeepSpeed",
            8152,
            "every pipeline stage divided the gradient that it sent upstream by the number of "
            "micro-batches, so that early stages got it divided several times",
        ),
        Mutant(
            "pretrain.engine.engine:StageEngine.__init__",
            "self.sequence_length = spec.config.data.sequence_length",
            "self.sequence_length = spec.config.data.sequence_length\n"
            "deepspeed_engine._backward_prologue_per_tensor = (\n"
            "    lambda gradient: gradient / deepspeed_engine.gradient_accumulation_steps())",
            (f"{_ANY_LAYOUT}[pipeline 2]",),
        ),
        proof_of("llama/demo", "parallel.pipeline=2", "training.gradient_accumulation_steps=2"),
    ),
    "gradients of norms stay partial under sequence parallelism": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            1446,
            "gradients of the final norm were not summed over tensor ranks, each of which had seen "
            "a part of the sequence",
        ),
        Mutant(
            "models.common.norms:RMSNorm.__init__",
            "declare_replicated("
            "self.weight, Constant(0.0 if zero_centered_gamma else 1.0), ctx=ctx)",
            "declare(self.weight, Sharding(), Constant(0.0 if zero_centered_gamma else 1.0))",
            (f"{_TENSOR_RANKS}[True-llama]",),
        ),
        proof_of("llama/demo", "parallel.tensor=2", "parallel.sequence_parallel=true"),
    ),
    "the router's gradient stays partial on tensor ranks": Exhibit(
        Source(
            "pytorch/torchtitan",
            2387,
            "gradients of the replicated router were not summed over tensor ranks, and its copies "
            "parted in the first step",
        ),
        Mutant(
            "parallel.moe:TopKRouter.__init__",
            'declare_replicated(self.weight, init, ctx=ctx, role="router")',
            'declare(self.weight, Sharding(), init, role="router")',
            (f"{_TENSOR_RANKS}[True-mod_experts]",),
        ),
        proof_of(
            "mod/demo",
            "model.num_experts=4",
            "parallel.tensor=2",
            "parallel.sequence_parallel=true",
        ),
        case="mod_experts",
    ),
    "gradients below the experts lose their reduction": Exhibit(
        Source(
            "pytorch/torchtitan",
            4054,
            "what flows back out of experts whose columns tensor ranks share was taken for whole, "
            "though each rank had a part of it",
        ),
        Mutant(
            "parallel.moe:MoELayer.forward",
            "copy_to_tensor_region(routing.weights, ctx=self.ctx)",
            "routing.weights",
            (f"{_TENSOR_RANKS}[False-mod_experts]",),
        ),
        proof_of("mod/demo", "model.num_experts=4", "parallel.tensor=2"),
        case="mod_experts",
    ),
    "the norm leaves out columns of experts": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            5916,
            "with expert and tensor ranks the gradient norm left out a part of the experts, and "
            "clipped less than it should",
        ),
        Mutant(
            "parallel.sharding:declare",
            "parameter.tensor_model_parallel = sharding.dim is not None",
            "parameter.tensor_model_parallel = (\n"
            "    sharding.dim is not None and sharding.experts is None)",
            (f"{_EXPERTS}a_run_at_any_expert_size_equals_one_process[tensor 2 x expert 2]",),
        ),
        proof_of(
            "mod/demo", "model.num_experts=4", "parallel.tensor=2", "parallel.expert=2", ranks=4
        ),
        case="mixture",
    ),
    "a tensor rank balances its own part of the sequence": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            1740,
            "with sequence parallelism each tensor rank balanced the choices of its own tokens, "
            "which were others than those of the whole sequence",
        ),
        Mutant(
            "models.dynamic.token_router:gather_or_broadcast",
            "torch.cat(parts)",
            "torch.cat([part - part.mean(dim=0) for part in parts])",
            (f"{_DYNAMIC}two_tensor_ranks_equal_one_in_every_loss_and_every_gradient",),
        ),
        (
            *proof_of(
                "mod/demo",
                "parallel.tensor=2",
                "parallel.sequence_parallel=true",
                "training.precision=bf16",
            ),
            "--depth",
            "own",
        ),
        case="mod",
    ),
    "auxiliary losses count once per tensor rank": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            5047,
            "the gradient of the balance and z losses of experts depended on the number of tensor "
            "ranks",
        ),
        Mutant(
            "parallel.regions:scale_replicated_grad",
            "_ScaleGrad.apply(x, ctx.tensor.size) if ctx.sequence_parallel else x",
            "x",
            (f"{_TENSOR_RANKS}[True-mod_experts]",),
        ),
        proof_of(
            "mod/demo",
            "model.num_experts=4",
            "parallel.tensor=2",
            "parallel.sequence_parallel=true",
        ),
        case="mod_experts",
    ),
    "the balance loss depends on the micro-batch": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            5798,
            "the weight of a balance loss per sequence depended on the number of sequences in a "
            "micro-batch",
        ),
        Mutant(
            "parallel.moe:TopKRouter.forward",
            "mean_of_tokens(chosen, lengths) / self.top_k",
            "(mean_of_tokens(chosen, lengths) / self.top_k).mean(dim=0, keepdim=True)",
            (f"{_CONTRACT}a_step_is_the_same_in_any_micro_batches[False-mod_experts]",),
        ),
        proof_of("mod/demo", "model.num_experts=4", "training.gradient_accumulation_steps=2"),
        case="mod_experts",
    ),
    "a stage clips by its own norm": Exhibit(
        Source(
            "pytorch/torchtitan",
            596,
            "under pipelines each stage clipped by the norm of its own parameters",
        ),
        Mutant(
            "pretrain.engine.optimizers:fuse_group_norms",
            "optimizer.get_grad_norm_direct(gradients, parameters, norm_type)",
            "torch.stack([gradient.norm() for gradient in gradients]).norm()",
            (f"{_ANY_LAYOUT}[pipeline 2]",),
        ),
        proof_of("llama/demo", "parallel.pipeline=2"),
    ),
    "micro-batches are summed in bf16": Exhibit(
        Source(
            "deepspeedai/DeepSpeed",
            2768,
            "with ZeRO, gradients of micro-batches were accumulated in bf16, and training diverged "
            "now and then",
        ),
        Mutant(
            "pretrain.config.deepspeed:_owned",
            '_Owned("fp32", "fp32 accumulation of gradients")',
            '_Owned("fp32" if training.precision == "fp32" else "bf16",'
            ' "fp32 accumulation of gradients")',
            ("tests/pretrain/config/test_deepspeed.py",),
        ),
        proof_of("llama/demo", "training.gradient_accumulation_steps=2", "training.precision=bf16"),
    ),
    "copies of a tied matrix drift apart": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            656,
            "the embedding and the head of a pipeline, one matrix, came to differ in training",
        ),
        Mutant(
            "parallel.pipeline:PipelineStage.get_tied_weights_and_groups",
            "[(_TiedGradient(tied.parameter), tied.group) for tied in self.tied_parameters]",
            "[]",
            (f"{_ENGINE}a_tied_head_trains_alike_in_one_process_and_across_stages",),
        ),
        proof_of("llama/demo", "model.tie_embeddings=true", "parallel.pipeline=2"),
        case="llama_qwen2_shape",
    ),
    "what is carried beside the hidden state loses its gradient": Exhibit(
        Source(
            "RBLN-SW/vllm-rbln",
            1007,
            "auxiliary hidden states were dropped where a pipeline is cut",
        ),
        Mutant(
            "parallel.wire:_Pack.backward",
            "(None, *_from_bytes(gradient, ctx.fields))",
            "(None, *_from_bytes(gradient, ctx.fields)[:1], *[None] * (len(ctx.fields) - 1))",
            (
                f"{_CONTRACT}stages_joined_by_the_wire_equal_the_whole_model_bit_for_bit"
                "[daria_former]",
            ),
        ),
        proof_of("daria_former/demo", "parallel.pipeline=2"),
        case="daria_former",
    ),
    "data ranks average their own means": Exhibit(
        Source(
            "pytorch/torchtitan",
            2206,
            "each rank divided by the number of its own scored tokens, so that a token weighed "
            "more where there were few",
        ),
        Mutant(
            "pretrain.engine.train_spec:count_scored",
            "if ctx.data.size > 1: dist.all_reduce(total, group=ctx.data.group)",
            "total *= ctx.data.size",
            (f"{_MASKED}[llama-data 2]",),
        ),
        proof_of("llama/demo", "data.reset_at_documents=true"),
    ),
    "micro-batches average their own means": Exhibit(
        Source(
            "meta-pytorch/torchtune",
            1875,
            "under accumulation the mean of the means of micro-batches was minimised, not the mean "
            "over tokens",
        ),
        Mutant(
            "pretrain.engine.engine:PlainEngine.train_step",
            "if self.spec.segmented: ...",
            "if False: ...",
            (f"{_MASKED}[llama-accumulation 4]",),
        ),
        proof_of(
            "llama/demo",
            "data.reset_at_documents=true",
            "training.gradient_accumulation_steps=2",
            ranks=1,
        ),
    ),
    "tokens that are not scored are counted": Exhibit(
        Source(
            "PrimeIntellect-ai/prime-rl",
            674,
            "the sum of the losses was divided by a count that included padding",
        ),
        Mutant(
            "pretrain.engine.train_spec:count_scored",
            "int((batch.labels != IGNORED_LABEL).sum())",
            "batch.labels.numel()",
            ("tests/pretrain/layouts/test_masked_loss.py", "tests/pretrain/test_batch_ramp.py"),
        ),
        proof_of("llama/demo", "data.reset_at_documents=true"),
    ),
    "every tensor rank adds the bias": Exhibit(
        Source(
            "huggingface/text-generation-inference",
            1036,
            "a row-parallel layer added its bias on every rank before the sum over ranks",
        ),
        Mutant(
            "parallel.layers:_RowParallelLinear.forward",
            "product(x, self.weight)",
            "product(x, self.weight, self.bias)",
            (f"{_TENSOR_RANKS}[False-dtf_variant]",),
        ),
        proof_of("dtf/demo", "model.prior_type=swiglu", "parallel.tensor=2"),
        case="dtf_variant",
    ),
}
