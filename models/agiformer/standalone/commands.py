"""The published commands; models/agiformer/<command>.py are their entry points."""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.agiformer.block import GatedFusion
from models.agiformer.standalone.data import CurriculumDataLoader, byte_loader
from models.agiformer.standalone.memory_checks import check_memories
from models.agiformer.standalone.model import AGIFORMER, load_model
from models.agiformer.standalone.training import RecordedTrainer
from models.base import TokenInputs
from models.checkpoint import check_device
from models.generate import generate
from models.standalone.optimizer import build_optimizer
from models.standalone.trainer import TrainerSettings

# Of the published recall test: a needle, and how it is asked for.
NEEDLE = ("The secret code is ", "7491", ". ")
FILLER = "The weather was mild and the days went by without any news. "


def train_scaled(options: argparse.Namespace) -> None:
    """Train on `train.txt` of the folder, and measure on `val.txt`."""
    folder, length = Path(options.data_dir), options.seq_len
    train = byte_loader(
        folder / "train.txt", options.batch_size, length, shuffle=True, seed=options.seed
    )
    val = byte_loader(folder / "val.txt", options.batch_size, length, shuffle=False)
    _train(options, train, val, name="scaled")


def train_curriculum(options: argparse.Namespace) -> None:
    """Train through the stages of the folder."""
    batches = options.max_steps * options.accumulation
    loader = CurriculumDataLoader(
        options.data_dir, options.batch_size, options.seq_len, batches, seed=options.seed
    )

    def plasticity(step: int) -> float:
        return loader.stage_of(step * options.accumulation).plasticity

    _train(options, loader, loader.get_loader("val"), name="curriculum", plasticity=plasticity)


def _train(
    options: argparse.Namespace, train: Iterable[Any], val: Iterable[Any], **recorded: Any
) -> None:
    check_device(options.device)
    settings = TrainerSettings(
        max_steps=options.max_steps,
        warmup_steps=min(options.warmup, options.max_steps - 1),
        gradient_accumulation_steps=options.accumulation,
        max_grad_norm=0.5,
        use_amp=options.use_amp,
        eval_every=min(options.eval_every, options.max_steps),
        log_every=options.log_every,
    )
    torch.manual_seed(options.seed)
    model = _built(options)
    print(f"{model.count_parameters() / 1e6:.1f}M parameters", flush=True)
    _print_order_zero(Path(options.data_dir) / "val.txt")
    optimizer = build_optimizer(model, lr=options.lr, weight_decay=0.01)
    folder = Path(options.output)
    RecordedTrainer(
        model, settings, train, val, optimizer=optimizer, folder=folder, **recorded
    ).train()


def _print_order_zero(path: Path) -> None:
    """Print what the frequencies of its own bytes alone would need, the mark to beat."""
    text = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    shares = torch.bincount(text.long(), minlength=256) / len(text)
    bits = float(torch.special.entr(shares.double()).sum() / math.log(2))
    characters = len(text) - int(((text & 0xC0) == 0x80).sum())
    print(
        f"{path.name}: {len(text)} bytes, {len(text) / max(1, characters):.3f} a character; "
        f"{bits:.3f} bits per byte by their frequencies alone",
        flush=True,
    )


def _built(options: argparse.Namespace) -> AGIFORMER:
    return AGIFORMER(
        options.d_model,
        options.n_layers,
        options.num_heads,
        window_size=options.window_size,
        thinking_steps=options.thinking_steps,
        dropout=options.dropout,
        device=options.device,
    )


def generate_text(options: argparse.Namespace) -> None:
    """Print the prompt and its continuation."""
    model, prompt = _loaded(options), _prompt(options)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    rows = generate(
        model.body,
        prompt,
        max_new_tokens=options.length,
        temperature=options.temp,
        generator=generator,
    )
    print(bytes(b for b in rows[0].tolist() if b < 256).decode(errors="replace"))


def overfit(options: argparse.Namespace) -> bool:
    """Learn one repeated pattern of 16 bytes in 200 steps; whether the loss is below 0.1."""
    check_device(options.device)
    torch.manual_seed(0)
    model = AGIFORMER(d_model=256, n_layers=2, num_heads=4, dropout=0.0, device=options.device)
    optimizer = build_optimizer(model, lr=1e-3)
    text = (torch.arange(257) % 16).unsqueeze(0).to(options.device)
    for step in range(1, options.steps + 1):
        loss = model.loss(text[:, :-1], text[:, 1:]).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    succeeded = loss.item() < 0.1
    print("SUCCESS" if succeeded else "FAILURE: the loss is not below 0.1")
    return succeeded


def recall(options: argparse.Namespace) -> None:
    """Bits per byte of a needle asked for after more and more text, with the memory and without.

    The control opens every gate to attention, which reaches `window_size x n_layers` patches
    back."""
    model = _loaded(options)
    config = model.config
    if not config.has_memory:
        raise ValueError("memory=none: this model has no memory to switch off; give one that has")
    reach = config.window_size * config.num_layers * config.patch_size
    print(f"attention reaches {reach} bytes back")
    records = []
    least = len(NEEDLE[0] + NEEDLE[2])  # nothing between the two
    distances = options.distances or [max(least, reach * n // 4) for n in (1, 4, 8, 16)]
    if min(distances) < least:
        raise ValueError(
            f"--distances holds {min(distances)}, less than the {least} bytes of the question; "
            f"use {least} or more"
        )
    for distance in distances:
        record: dict[str, float] = {"distance": distance, "within_attention": distance <= reach}
        record["memory_on"] = _needle_bits(model, distance)
        with_control = _without_memory(model)
        record["memory_off"] = _needle_bits(with_control, distance)
        records.append(record)
        print(json.dumps(record), flush=True)


@torch.no_grad()
def _needle_bits(model: AGIFORMER, distance: int) -> float:
    """Bits per byte of the needle when it is asked for `distance` bytes after it was told."""
    question, answer, end = NEEDLE
    filler = (FILLER * (distance // len(FILLER) + 1))[: distance - len(question + end)]
    text = (question + answer + end + filler + question + answer).encode()
    tokens = torch.tensor([list(text)], device=model.body.ctx.device)
    logits = model.body(TokenInputs(tokens[:, :-1])).logits[-len(answer) :, 0]
    scores = logits.float().log_softmax(dim=-1).gather(1, tokens[0, -len(answer) :].unsqueeze(1))
    return -scores.mean().item() / math.log(2)


def _without_memory(model: AGIFORMER) -> AGIFORMER:
    """A copy whose blocks read their attention alone."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, GatedFusion):
            module.gate_bias.data.fill_(1e4)
    return other


@torch.no_grad()
def inspect_reasoning(options: argparse.Namespace) -> None:
    """Print how many steps the patches of a text take, and the ponder cost."""
    model = _loaded(options)
    config, most = model.config, model.config.thinking_steps
    if config.halting != "act":
        raise ValueError(
            f"halting={config.halting}: every patch of this model takes {most} steps; give one "
            "that halts"
        )
    taken: list[torch.Tensor] = []
    block: Any = model.body.get_submodule("reasoning")
    with block.register_forward_pre_hook(lambda _, given: taken.append(block.steps(given[0]))):
        output = model.body(TokenInputs(_prompt(options)))
    ponder, steps, _ = output.aux[0].tolist()
    patches = torch.bincount(taken[0][:, 0].long(), minlength=most + 1).tolist()
    record = {"mean_steps": steps, "ponder_cost": ponder, "most_steps": most}
    by_steps = {"patches_by_steps": {n: patches[n] for n in range(1, most + 1)}}
    print(json.dumps(record | by_steps))
    if not 1.05 < steps < most - 0.05:
        print(f"the block has collapsed: every patch takes about {steps:.2f} steps")


def memory_integrity(options: argparse.Namespace) -> bool:
    """Whether the memories of a model compute their recurrence, on a text; prints every check."""
    model, tokens = _loaded(options), _prompt(options)
    checks = check_memories(model, tokens)
    for check in checks:
        print(json.dumps(check._asdict()), flush=True)
    succeeded = all(check.passed for check in checks)
    print("SUCCESS" if succeeded else "FAILURE: at least one check has not passed")
    return succeeded


def _loaded(options: argparse.Namespace) -> AGIFORMER:
    check_device(options.device)
    return load_model(Path(options.model), device=options.device)


def _prompt(options: argparse.Namespace) -> torch.Tensor:
    """The bytes of `--prompt`, as they were typed, text or not: int64 [1, s]."""
    typed = options.prompt.encode(errors="surrogateescape")
    return torch.tensor([list(typed)], device=options.device)
