"""Small exports of every family, loaded as a process without this project loads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from models import convert
from tests.models.checkpoints import model, write_checkpoint
from tests.models.families import CASES, evaluated

VOCAB_SIZE = 320
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}
# As few layers as have everything, since tracing takes long, and nothing that is drawn in training.
_SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 2},
    "agiformer": {"num_layers": 1, "dropout": 0.0},
    "amrpa": {"num_layers": 3, "target_layers": [2], "memory_noise": 0.0, "dropout": 0.0},
    "daria_former": {"num_layers": 1, "esv_sites": 1, "dropout": 0.0},
    "dart": {"num_layers": 2},
    "mod": {"num_layers": 2},
    "dtf": {"num_layers": 2},
}


@dataclass
class Exports:
    """Directories of exports, each written when it is first asked for."""

    folder: Path
    _loaded: dict[str, Any] = field(default_factory=dict)

    def directory(self, family: str) -> Path:
        place = self.folder / family
        if not place.exists():
            case = CASES[family]
            changes = {"vocab_size": VOCAB_SIZE, **_SMALL[family]}
            config = case.config.model_copy(update=changes)
            whole = evaluated(model(config, case.family).train(), TOKENS)
            write_checkpoint(
                place / "step_1", config, family=case.family, whole=whole, tokenizer=None
            )
            convert.to_hf(place / "step_1", place / "hf")
            tokenizer().save_pretrained(place / "hf")
        return place / "hf"

    def shared(self, family: str) -> Any:
        """A model for uses that leave it as it is."""
        if family not in self._loaded:
            self._loaded[family] = self.load(family)
        return self._loaded[family]

    def load(self, family: str, **options: Any) -> Any:
        """A model of the use's own."""
        loaded = AutoModelForCausalLM.from_pretrained(
            self.directory(family), trust_remote_code=True, **options
        )
        where = "transformers." if family == "llama" else "transformers_modules."
        assert type(loaded).__module__.startswith(where)
        return loaded.eval()


class Engine(NamedTuple):
    """What a use is given: the exports, the family, and an empty folder."""

    exports: Exports
    family: str
    folder: Path

    def load(self, **options: Any) -> Any:
        return self.exports.load(self.family, **options)

    @property
    def model(self) -> Any:
        return self.exports.shared(self.family)

    @property
    def directory(self) -> Path:
        return self.exports.directory(self.family)


Use = Callable[[Engine], object]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, merges of one sentence, and a token that ends and pads."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(["the quick brown fox "] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")


@torch.no_grad()
def logits_of(model: Any, **given: Any) -> torch.Tensor:
    return model(input_ids=TOKENS, **given).logits


def assert_near(found: torch.Tensor, expected: torch.Tensor, within: float = 2e-5) -> None:
    """Within a part of the largest entry: fp32, and emotion states and norms."""
    error = (found - expected).abs().max().item()
    assert error <= within * expected.abs().max().item(), f"differs by {error:.1e}"
