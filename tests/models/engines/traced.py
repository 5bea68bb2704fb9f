"""torch.compile, torch.export, jit.trace and ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.engines.exports import TOKENS, Engine, assert_near, logits_of


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def compiled(engine: Engine) -> None:
    model = engine.load()
    expected = logits_of(model, use_cache=False)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_near(torch.compile(Logits(model), backend="aot_eager")(TOKENS), expected)


def compiled_whole(engine: Engine) -> None:
    model = engine.load()
    expected = logits_of(model, use_cache=False)
    torch._dynamo.reset()
    whole = torch.compile(Logits(model), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_near(whole(TOKENS), expected)


@torch.no_grad()
def exported(engine: Engine) -> None:
    model = engine.load()
    program = torch.export.export(Logits(model), (TOKENS,)).module()
    expected = logits_of(engine.load(), use_cache=False)
    assert_near(program(TOKENS), expected)
    assert_near(logits_of(model, use_cache=False), expected)


@torch.no_grad()
def exported_of_any_length(engine: Engine) -> None:
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 1: auto},)
    program = torch.export.export(Logits(engine.load()), (TOKENS,), dynamic_shapes=shapes).module()
    part = TOKENS[:1, :17]
    assert_near(program(part), Logits(engine.load())(part))


@torch.no_grad()
def jit_traced(engine: Engine) -> None:
    model = Logits(engine.load())
    traced = torch.jit.trace(model, (TOKENS,), check_trace=False)
    other = TOKENS.flip(0)
    assert_near(traced(other), model(other))


@torch.no_grad()
def onnx(engine: Engine) -> None:
    import onnxruntime

    path, model = engine.folder / "model.onnx", Logits(engine.load())
    torch.onnx.export(model, (TOKENS,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    other = TOKENS.flip(0)
    (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    assert_near(torch.from_numpy(found), Logits(engine.load())(other))
