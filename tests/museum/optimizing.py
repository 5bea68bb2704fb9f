"""Optimizer steps: the use of the gradient."""

from __future__ import annotations

from tests.faults.mutation import Mutant
from tests.museum.exhibit import Exhibit, Source, proof_of

_ENGINE = "tests/pretrain/engine/test_engine.py::test_"

OPTIMIZING = {
    "norms and biases decay": Exhibit(
        Source(
            "ServiceNow/Fast-LLM",
            545,
            "a refactoring lost the exclusion of norms and biases from weight decay",
        ),
        Mutant(
            "pretrain.engine.parameter_groups:treatment_of",
            '0.0 if role == "vector" else training.weight_decay',
            "training.weight_decay",
            (
                "tests/pretrain/engine/test_parameter_groups.py"
                "::test_no_vector_decays_whatever_its_number_of_dimensions",
            ),
        ),
        proof_of("llama/demo"),
    ),
    "the rate counts micro-batches": Exhibit(
        Source(
            "huggingface/accelerate",
            999,
            "the learning-rate schedule advanced in every micro-batch of an accumulated step",
        ),
        Mutant(
            "pretrain.loop:TrainLoop._steps",
            "learning_rate(step, training, total_steps=total)",
            "learning_rate(step * self.engine.num_micro_batches, training, total_steps=total)",
            (f"{_ENGINE}a_run_at_any_layout_equals_a_plain_torch_loop[one process, ZeRO-1]",),
        ),
        proof_of("llama/demo", "training.gradient_accumulation_steps=2"),
    ),
    "copies of a tied matrix are trained in two ways": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            4641,
            "the copy of a tied embedding on the last stage was routed to another optimizer than "
            "the one on the first",
        ),
        Mutant(
            "pretrain.engine.parameter_groups:parameter_groups",
            "treatment_of(names.get(name, name), parameter, training)",
            "treatment_of(name, parameter, training)",
            (f"{_ENGINE}a_tied_matrix_has_one_learning_rate_at_every_layout",),
        ),
        proof_of(
            "llama/demo",
            "model.tie_embeddings=true",
            "parallel.pipeline=2",
            "training.lr_multipliers={embedding: 0.1, head: 0.5}",
        ),
        case="llama_qwen2_shape",
    ),
    "masters keep the weights from before the load": Exhibit(
        Source(
            "NVIDIA/Megatron-LM",
            174,
            "weights were loaded after the optimizer had copied the random ones, which its first "
            "step brought back",
        ),
        Mutant(
            "pretrain.engine.build:build_engine",
            "engine = _initialize(module, spec)",
            "loaded = [p.detach().clone() for p in module.parameters()]\n"
            "for p in module.parameters() if load_layer is not None else ():\n"
            "    p.data.normal_()\n"
            "engine = _initialize(module, spec)\n"
            "for p, weight in zip(module.parameters(), loaded):\n"
            "    p.data.copy_(weight)",
            (
                "tests/pretrain/test_export.py::test_training_begins_with_imported_weights_at_any_layout",
            ),
        ),
        proof_of("llama/demo"),
    ),
}
