"""Implementation of `daria-generate` and `daria-export`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from models.checkpoint import check_device
from models.common.sampling import check_seed
from models.convert import to_hf
from models.daria_former.standalone.checkpoint_io import is_run, load_checkpoint, write_checkpoint
from models.daria_former.standalone.generation import DariaGenerator
from models.prompting import load_prompting
from models.standalone.train_command import checkpoint_path, local_tokenizer


def generate_text(options: argparse.Namespace) -> str:
    """The prompt and its continuation.

    Raises:
        ValueError: an option is wrong, or there is no checkpoint or tokenizer.
    """
    if options.temperature == 0 and not options.greedy:
        raise ValueError("--temperature 0 draws nothing; for the most probable token use --greedy")
    check_device(options.device)
    check_seed(options.seed)
    checkpoint = checkpoint_path(options.checkpoint)
    model, spec, text = load_checkpoint(checkpoint, device=options.device)
    spec = options.tokenizer or spec
    if spec is None:
        raise ValueError(f"{options.checkpoint} names no tokenizer; give one with --tokenizer")
    prompting = load_prompting(spec if spec == "bytes" else local_tokenizer(spec), text)
    ids = prompting.encode(options.prompt, vocab_size=model.config.vocab_size)
    rows = DariaGenerator(model).generate(
        torch.tensor([ids], device=options.device),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        do_sample=not options.greedy,
        eos_token_id=prompting.eod_id,
        use_variability=not options.no_variability,
        generator=torch.Generator(options.device).manual_seed(options.seed),
    )
    return prompting.decode(rows[0].tolist())


def export_model(options: argparse.Namespace) -> None:
    """Write a Hugging Face directory.

    Raises:
        ValueError: there is no checkpoint, or its adapters are neither merged nor configured.
    """
    source, dtype = checkpoint_path(options.checkpoint), torch.float16 if options.half else None
    with tempfile.TemporaryDirectory() as folder:
        if options.merge_lora or not is_run(source):
            model, tokenizer, text = load_checkpoint(source, device="cpu")
            source = Path(folder) / "step_0"
            merge = options.merge_lora
            write_checkpoint(model, source, tokenizer=tokenizer, text=text, merge=merge)
        for line in to_hf(source, Path(options.output), dtype=dtype):
            print(line)
    print(f"wrote {options.output}")
