"""What `delayed` remembers comes back bit for bit, and nothing is unpickled for it."""

from __future__ import annotations

import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from parallel.checkpoint.errors import CheckpointError
from parallel.fp8.history import pack_history, unpack_history
from tests.refusals import assert_refused

_refused = partial(assert_refused, error=CheckpointError)


def _meta(seed: int, *, history: int = 16) -> dict[str, object]:
    """As Transformer Engine keeps it: three tensors forward, two backward."""
    generator = torch.Generator().manual_seed(seed)
    return {"fp8_checkpoint": True, "num_gemms": 1} | {
        f"scaling_{direction}": SimpleNamespace(
            scale=torch.rand(number, generator=generator),
            amax_history=torch.rand(history, number, generator=generator),
        )
        for direction, number in (("fwd", 3), ("bwd", 2))
    }


def test_scales_and_history_come_back_bit_for_bit_through_a_checkpoint_of_torch(tmp_path):
    meta, fresh = _meta(1), _meta(2)
    torch.save({"layer._extra_state": pack_history(meta)}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)["layer._extra_state"]
    unpack_history(state, fresh)
    for name in ("scaling_fwd", "scaling_bwd"):
        assert torch.equal(fresh[name].scale, meta[name].scale)
        assert torch.equal(fresh[name].amax_history, meta[name].amax_history)


def test_recipes_without_history_and_layers_before_their_first_step_have_no_state():
    assert pack_history({"fp8_checkpoint": False}).numel() == 0
    stateless = {"scaling_fwd": SimpleNamespace(), "scaling_bwd": SimpleNamespace()}
    assert pack_history(stateless).numel() == 0


def test_pickled_state_is_refused_and_not_executed(tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    packed = torch.frombuffer(bytearray(pickle.dumps(Canary())), dtype=torch.uint8)
    with _refused("FP8 history", value="pickle", constraint="not", remedy="tensorwise"):
        unpack_history(packed, _meta(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("history", [8, 32])
def test_a_history_of_another_length_is_refused(history):
    packed = pack_history(_meta(1, history=history))
    with _refused("FP8 history", value=history, constraint="16", remedy="checkpoint"):
        unpack_history(packed, _meta(1))
