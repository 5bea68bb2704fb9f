"""The contract of every exported model, as transformers loads it.

What only one family has is tested with the family.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from models import convert
from models.base import TokenInputs, logits_of
from models.checkpoint import load_model, open_checkpoint
from models.generate import generate
from tests.models import checkpoints
from tests.models.families import CASES, evaluated
from tests.models.hf.alone import computed_alone
from tests.models.hf.export_folder import TOKENS, VOCAB_SIZE, Exported, export
from tests.models.hf.exports import FAMILIES as OWN_CODE
from tests.tiers import tiered
from tests.tolerance import FP64, assert_close, rounding

MASK = torch.ones_like(TOKENS)
GREEDY = {"do_sample": False, "pad_token_id": 0}
NEW = 30  # 51 tokens: over the windows, segments and capacities of all families
# One of each family, and those that show the rest of its settings.
FAMILIES = ("llama", *OWN_CODE)
VARIANTS = (
    "agiformer_variant",
    "amrpa_variant",
    "llama_qwen2_shape",
    "daria_former_variant",
    "daria_former_lora",
    "dart_variant",
    "mod_variant",
    "mod_experts",
    "dtf_variant",
)
# One of each family with code of its own; tests of the families export the others.
ORDINARY = (
    "agiformer_variant",
    "amrpa_variant",
    "daria_former_variant",
    "dart_variant",
    "mod_experts",
    "dtf_variant",
)


class Alone(NamedTuple):
    """What transformers alone computed, and where it saved the model."""

    result: dict[str, torch.Tensor]
    saved: Path


def _within(exported: Exported) -> float:
    """How far logits may be apart, as a part of the largest. Classes of transformers compute norms
    and rotations in fp32, two and one in each of 4 layers, and one norm after them."""
    if exported.code:
        return FP64["rtol"]
    return rounding(torch.float32, depth=13, length=exported.config.hidden_size)


def _export(folder: Path, case: str) -> Exported:
    family, config = CASES[case]
    config = config.model_copy(update={"vocab_size": VOCAB_SIZE})
    tokens = torch.randint(0, VOCAB_SIZE, (4, 64), generator=torch.Generator().manual_seed(5))
    whole = evaluated(checkpoints.model(config, family).train(), tokens)
    return export(folder, family, config, whole)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Exported]:
    return {case: _export(tmp_path_factory.mktemp("export"), case) for case in FAMILIES}


@pytest.fixture(params=FAMILIES)
def exported(request, exports) -> Exported:
    return exports[request.param]


@pytest.fixture(scope="module")
def alone(exports, tmp_path_factory) -> dict[str, Alone]:
    """One process for all: most of its time it imports torch and transformers."""
    folder = tmp_path_factory.mktemp("alone")
    directories = [each.hf for each in exports.values()]
    results = computed_alone(directories, TOKENS, new_tokens=NEW, folder=folder)
    return {
        case: Alone(result, folder / f"{number}.saved")
        for number, (case, result) in enumerate(zip(exports, results, strict=True))
    }


@torch.no_grad()
@pytest.mark.parametrize("case", FAMILIES)
def test_a_process_with_transformers_alone_computes_the_same(case, exports, alone):
    exported, (result, saved) = exports[case], alone[case]
    model = exported.double
    output = model(TokenInputs(TOKENS))
    assert_close(result["logits"], logits_of(output).transpose(0, 1), _within(exported), "logits")
    torch.testing.assert_close(result["again"], result["logits"], **FP64)
    assert torch.equal(result["greedy"], generate(model, TOKENS, max_new_tokens=NEW))
    following = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
    terms = exported.family.loss(output, following, config=exported.config, ctx=model.ctx).terms
    assert_close(result["loss"], terms["lm_loss"], _within(exported), "loss")
    assert exported.code <= {path.name for path in saved.iterdir()}
    assert bool(exported.code) == (exported.family.name in OWN_CODE)


@torch.no_grad()
@pytest.mark.parametrize("case", tiered(VARIANTS, ORDINARY))
def test_every_feature_is_exported(case, tmp_path):
    exported = _export(tmp_path, case)
    model, loaded = exported.loaded(output_loading_info=True)
    assert not any(loaded.values())
    logits = logits_of(exported.double(TokenInputs(TOKENS))).transpose(0, 1)
    assert_close(model(TOKENS).logits, logits, _within(exported), "logits")
    continued = model.generate(TOKENS, attention_mask=MASK, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(continued, generate(exported.double, TOKENS, max_new_tokens=NEW))


def test_an_export_comes_back_bit_for_bit(exported, tmp_path):
    exported.loaded(dtype=torch.float32).save_pretrained(tmp_path / "saved")
    for name, directory in (("from_export", exported.hf), ("from_saved", tmp_path / "saved")):
        convert.from_hf(directory, tmp_path / name)
        stored = open_checkpoint(tmp_path / name)
        assert stored.config == exported.config
        back = load_model(stored, device="cpu").state_dict()
        for key, tensor in exported.whole.state_dict().items():
            assert torch.equal(back[key], tensor), key


@torch.no_grad()
def test_rows_of_different_lengths_are_generated_as_if_alone(exported):
    model = exported.loaded()
    columns, starts = torch.arange(21).expand(2, -1), torch.tensor([[5], [2]])
    mask = (columns >= starts).long()
    options = {"max_new_tokens": NEW, **GREEDY}
    together = model.generate(TOKENS * mask, attention_mask=mask, **options)
    for row, start in enumerate((5, 2)):
        own = TOKENS[row : row + 1, start:]
        alone = model.generate(own, attention_mask=torch.ones_like(own), **options)
        assert torch.equal(together[row, start:], alone[0])


@torch.no_grad()
def test_generation_with_the_cache_equals_generation_without(exported):
    model = exported.loaded()
    options = {"attention_mask": MASK, "max_new_tokens": 15, **GREEDY}
    cached = model.generate(TOKENS, **options)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


@torch.no_grad()
def test_drafts_that_are_refused_leave_no_trace(exported):
    model = exported.loaded()
    options = {"max_new_tokens": NEW, "attention_mask": MASK[:1], "do_sample": False}
    expected = model.generate(TOKENS[:1], **options)
    drafts = model.generate(TOKENS[:1], prompt_lookup_num_tokens=3, **options)
    assert torch.equal(drafts, expected)
