"""Data, evaluation and export."""

from __future__ import annotations

from tests.faults.mutation import Mutant
from tests.museum.exhibit import Exhibit, Source, proof_of

_CONTRACT = "tests/models/test_contract.py::test_"
_ANY_LAYOUT = (
    "tests/pretrain/engine/test_engine.py::test_a_run_at_any_layout_equals_a_plain_torch_loop"
)
_EXPORT = (
    "tests/pretrain/test_export.py"
    "::test_an_exported_checkpoint_gives_the_same_logits_in_transformers[whole]"
)
_HF = "tests/models/llama/test_hf.py::test_"

DATA = {
    "data ranks read the same samples": Exhibit(
        Source(
            "openspeech-team/openspeech",
            149,
            "without a distributed sampler every rank drew the same examples",
        ),
        Mutant(
            "data_tools.loading.loader:TrainLoader._locate_block",
            "(numbers * self._data_size + self._data_rank) * self._micro_batch_size",
            "numbers * self._data_size * self._micro_batch_size",
            (f"{_ANY_LAYOUT}[data 2, ZeRO-1]",),
        ),
        proof_of("llama/demo"),
    ),
    "labels are shifted twice": Exhibit(
        Source(
            "huggingface/transformers",
            47394,
            "labels were shifted by the model and again by the loss, and the token after the next "
            "was learnt",
        ),
        Mutant(
            "data_tools.loading.batch:to_batch",
            "windows.ids[:, 1:]",
            "np.roll(windows.ids, -1, axis=1)[:, 1:]",
            ("tests/data_tools",),
        ),
        proof_of("llama/demo"),
    ),
    "documents of a row attend to each other": Exhibit(
        Source(
            "huggingface/nanoVLM",
            204,
            "packed samples attended to the samples before them in the row",
        ),
        Mutant(
            "models.common.attention:_packed_block",
            "index >= document_starts.unsqueeze(-1)",
            "index >= 0 * document_starts.unsqueeze(-1)",
            (f"{_CONTRACT}packed_documents_equal_separate_ones[lengths0-llama]",),
        ),
        proof_of("llama/demo", "data.reset_at_documents=true"),
    ),
    "each rank reports its own held-out loss": Exhibit(
        Source(
            "Lightning-AI/litgpt",
            599,
            "the validation loss was never reduced over ranks, each of which had seen its part",
        ),
        Mutant(
            "pretrain.engine.engine:PlainEngine._evaluate",
            "dist.all_reduce(total, group=self.ctx.data.group)",
            "None",
            (f"{_ANY_LAYOUT}[data 2, ZeRO-1]",),
        ),
        proof_of("llama/demo"),
    ),
}

EXPORT = {
    "weights are missing from the export": Exhibit(
        Source(
            "NVIDIA-NeMo/Megatron-Bridge",
            1883,
            "none of the weights of a resized model were exported, of which only warnings told",
        ),
        Mutant(
            "models.hf.export_weights:_write_weights",
            "full.to(dtype).contiguous()",
            "torch.zeros_like(full, dtype=dtype)",
            (_EXPORT,),
        ),
        proof_of("llama/demo"),
    ),
    "square matrices are exported transposed": Exhibit(
        Source(
            "huggingface/transformers",
            47031,
            "whether a weight was transposed was told by its shape, so that square ones came out "
            "transposed",
        ),
        Mutant(
            "models.hf.export_weights:_write_weights",
            "full.to(dtype).contiguous()",
            "(full.mT if full.shape[0] == full.shape[-1] and full.dim() > 1 else full)"
            ".to(dtype).contiguous()",
            (_EXPORT,),
        ),
        proof_of("llama/demo"),
    ),
    "the scaling of positions is lost in the export": Exhibit(
        Source(
            "NVIDIA-NeMo/Megatron-Bridge",
            5097,
            "the conversion dropped a rotary scaling, and the model computed something else",
        ),
        Mutant(
            "models.hf.llama_names:rope_parameters",
            "config.rope_scaling is not None",
            "False",
            (f"{_HF}logits_loss_and_gradients_equal_those_of_transformers",),
        ),
        proof_of(
            "llama/demo",
            "model.rope_scaling={type: llama3, factor: 8.0, low_freq_factor: 1.0, "
            "high_freq_factor: 4.0, original_max_position_embeddings: 8}",
        ),
    ),
    "rotary angles are computed in bf16": Exhibit(
        Source(
            "huggingface/transformers",
            25681,
            "casting a model to bf16 cast its rotary frequencies too, which gave other angles",
        ),
        Mutant(
            "models.common.rope:RotaryTable._compute",
            "1.0 / self.theta ** (exponents / self.head_dim)",
            "(1.0 / self.theta ** (exponents / self.head_dim)).bfloat16().float()",
            (f"{_HF}logits_loss_and_gradients_equal_those_of_transformers",),
        ),
        proof_of("llama/demo"),
    ),
}
