"""Sample text from a checkpoint.

    python -m models.generate --checkpoint DIR --prompt TEXT [--max-new-tokens N]
        [--temperature T] [--top-k K] [--top-p P] [--seed S] [--device cpu|cuda]
        [--compile] [--tokenizer SPEC] [--eod TOKEN] [--[no-]add-bos]
        [--special-tokens parse|plain]

DIR is a checkpoint (`step_N`), or a run directory, whose newest checkpoint is used. Prompts are
tokenized like the training documents; for an imported model, as in transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from models.common.sampling import check_sampling, check_seed
from models.program import program
from parallel.checkpoint.newest import find_manifest

# torch takes seconds, for which --help and a mistake do not wait.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from parallel.carry import SequentialModel

# Chunk size of the prefill, in tokens.
PREFILL_CHUNK = 512
_EXAMPLE = """example:
  %(prog)s --checkpoint runs/demo --prompt "def main(" --temperature 0.7
"""


class ScoreProcessor(Protocol):
    """A family's hook that changes the scores before a token is sampled."""

    def observe(self, output: Any) -> None:
        """Observe the last layer's output for the newest tokens, with the logits of the last."""

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Scores [b, V] of the token after `tokens` [b, t] in place of the model's logits."""
        ...


def generate(
    model: SequentialModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    lengths: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    make_inputs: Callable[[Tensor], Any] | None = None,
    processor: ScoreProcessor | None = None,
    compiled: bool = False,
) -> Tensor:
    """Continue every row of `tokens` int64 [b, p] by up to `max_new_tokens`: [b, p + new].

    `lengths` int64 [b]: the tokens of each prompt, in columns 0 to lengths - 1, where prompts
    differ; what fills the other columns is not read. [b, max(lengths) + new] is returned, where
    row i has its prompt, up to `new` tokens, and then `eos_id`, or 0 without one. All rows take
    part in every call: from the end of the shortest prompt on the others advance by one token a
    call, so that prompts of similar lengths go together best.

    Temperature 0 is greedy decoding, which continues a row as it would alone. A row that has
    produced `eos_id` is filled with it; generation ends when all rows have. Under tensor
    parallelism every rank needs a generator in the same state. `make_inputs`: builds the first
    layer's inputs from tokens; None: TokenInputs. `compiled`: the steps after the prompt are one
    compiled program with fixed buffers (models.compiled_decoding).

    Raises:
        ValueError: a setting out of its range or without effect, an empty prompt, or `compiled`
            with a family or layout that has no such form.
    """
    import torch

    from models.base import TokenInputs

    if tokens.numel() == 0:
        raise ValueError(f"tokens of shape {list(tokens.shape)} are empty; give a prompt")
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    _check_lengths(lengths, tokens)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    with torch.inference_mode():
        return _generate(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            lengths=lengths,
            eos_id=eos_id,
            draw=draw,
            make_inputs=make_inputs or TokenInputs,
            processor=processor,
            compiled=compiled,
        )


def _generate(
    model: SequentialModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    lengths: Tensor | None,
    eos_id: int | None,
    draw: Callable[[Tensor], Tensor],
    make_inputs: Callable[[Tensor], Any],
    processor: ScoreProcessor | None,
    compiled: bool,
) -> Tensor:
    import torch

    from models.base import logits_of
    from models.compiled_decoding import check_fixed_caches, compiled_steps, room_for
    from parallel.cross_entropy import logits_of_last
    from parallel.layers import gather_logits

    if lengths is not None:
        tokens = tokens[:, : int(lengths.max())]
    batch_size, prompt_length = tokens.shape
    total = prompt_length + max_new_tokens
    if compiled:
        check_fixed_caches(model)
    cache = model.new_cache(batch_size, room_for(total) if compiled else total)
    filler = 0 if eos_id is None else eos_id
    rows = tokens.new_full((batch_size, total), filler)
    rows[:, :prompt_length] = tokens
    ended = torch.zeros(batch_size, dtype=torch.bool, device=tokens.device)

    def eager(inputs: Any) -> Any:
        with logits_of_last(1):
            return model(inputs, cache)

    def logits_after(chunk: Tensor, call: Callable[[Any], Any]) -> Tensor:
        output = call(make_inputs(chunk))
        if processor is not None:
            processor.observe(output)
        return logits_of(output)

    column = prompt_length if lengths is None else int(lengths.min())
    for chunk in rows[:, :column].split(PREFILL_CHUNK, dim=1):
        logits = logits_after(chunk, eager)
    steps = compiled_steps(model, cache, length=column) if compiled else nullcontext(eager)
    with steps as step:
        while True:
            scores = gather_logits(logits[-1], ctx=model.ctx)
            if processor is not None:
                scores = processor(rows[:, :column], scores)
            token = draw(scores)
            if lengths is not None:
                ended |= column >= lengths + max_new_tokens
            if lengths is not None or eos_id is not None:
                token = token.masked_fill(ended, filler)
            if eos_id is not None:
                ended |= token == eos_id
            if lengths is not None and column < prompt_length:
                is_prompt = column < lengths
                token = torch.where(is_prompt, rows[:, column], token)
                ended &= ~is_prompt
            rows[:, column] = token
            column += 1
            if column == total or (eos_id is not None and bool(ended.all())):
                return rows[:, :column]
            logits = logits_after(token.unsqueeze(1), step)


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of logits [b, V]: int64 [b].

    `top_k` keeps the k largest logits. `top_p` then keeps the smallest set of most probable tokens
    whose probabilities sum to at least p.
    """
    import torch

    if temperature == 0.0:
        return logits.argmax(dim=-1)
    ordered, ids = (logits.float() / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        ordered, ids = ordered[:, :top_k], ids[:, :top_k]
    probabilities = ordered.softmax(dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    # One number per row, regardless of vocabulary padding: every layout draws the same tokens.
    uniform = torch.rand(len(ids), 1, generator=generator, device=ids.device, dtype=torch.float64)
    cumulative = probabilities.double().cumsum(dim=-1)
    choice = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(-1, choice.minimum(last)).squeeze(-1)


def _check_settings(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more; raise it")
    check_sampling(temperature, top_k=top_k, top_p=top_p)
    if temperature == 0.0 and (top_k is not None or top_p is not None):
        raise ValueError(
            f"top_k={top_k} and top_p={top_p} have no effect at temperature=0; set a temperature"
        )


def _check_lengths(lengths: Tensor | None, tokens: Tensor) -> None:
    if lengths is None:
        return
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(
            f"lengths of shape {list(lengths.shape)} must be {list(tokens.shape[:1])}; give the "
            "length of each prompt"
        )
    if not 1 <= int(lengths.min()) <= int(lengths.max()) <= tokens.shape[1]:
        raise ValueError(
            f"lengths={lengths.tolist()} must be from 1 to the {tokens.shape[1]} columns of "
            "tokens; give a prompt in every row"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parse(argv)
    try:
        print(_continue_text(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _continue_text(arguments: argparse.Namespace) -> str:
    _check_settings(
        arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.top_p
    )
    check_seed(arguments.seed)
    find_manifest(Path(arguments.checkpoint))
    import torch

    from models.checkpoint import check_device, load_model, open_checkpoint
    from models.prompting import load_prompting
    from parallel.cpu.compat import device_type

    device = arguments.device or device_type()
    check_device(device)
    stored = open_checkpoint(arguments.checkpoint)
    spec = arguments.tokenizer or stored.tokenizer
    if spec is None:
        raise ValueError(f"{arguments.checkpoint} names no tokenizer; give one with --tokenizer")
    prompting = load_prompting(
        spec,
        stored.text,
        eod=arguments.eod,
        add_bos=arguments.add_bos,
        special_tokens=arguments.special_tokens,
    )
    ids = prompting.encode(arguments.prompt, vocab_size=stored.config.vocab_size)
    _check_length(len(ids), arguments.max_new_tokens, stored.config.max_position_embeddings)
    model = load_model(stored, device=device)
    rows = generate(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        eos_id=prompting.eod_id,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        compiled=arguments.compile,
    )
    return prompting.decode(rows[0].tolist())


def _check_length(prompt: int, new: int, longest: int) -> None:
    if prompt + new <= longest:
        return
    remedy = f"lower it to {longest - prompt}" if prompt < longest else "shorten --prompt"
    raise ValueError(
        f"--max-new-tokens {new} with the {prompt} tokens of the prompt is more than the model's "
        f"max_position_embeddings={longest}; {remedy}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("python -m models.generate"),
        description="Sample text from a checkpoint.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint (step_N) or a run")
    parser.add_argument("--prompt", required=True, help="text to continue; may be empty")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=100,
        metavar="N",
        help="tokens to add at most (default: 100)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0 takes the most probable token (default: 0.8)",
    )
    parser.add_argument("--top-k", type=int, help="keep the k most probable tokens")
    parser.add_argument("--top-p", type=float, help="keep the most probable tokens up to this sum")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", help="cpu, cuda (default: cuda where there is one)")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile a step (seconds to minutes), one CUDA graph on a GPU; slower on a CPU",
    )
    parser.add_argument("--tokenizer", help="instead of the one that the checkpoint names")
    parser.add_argument(
        "--eod", metavar="TOKEN", help="stop at it; default: what ended the documents of training"
    )
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin the prompt with the begin token; default: as the documents of training did",
    )
    parser.add_argument(
        "--special-tokens",
        choices=("parse", "plain"),
        help="what becomes of a special token that the prompt spells; default: as in training",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
