"""torch.onnx.export, run by onnxruntime on other tokens than those of the export."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models.engines.exports import TOKENS, Engine, assert_near
from tests.models.engines.traced import Logits


@torch.no_grad()
def _check(engine: Engine, dynamic: tuple[int, ...], other: Tensor) -> None:
    import onnxruntime

    model, file = Logits(engine.load()), engine.folder / "model.onnx"
    shapes = dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC)
    try:
        torch.onnx.export(model, (TOKENS,), file, dynamic_shapes=(shapes,), verbose=False)
    except torch.onnx.OnnxExporterError as error:
        # The exporter puts its own report around what the model says.
        raise (error.__cause__ or error) from None
    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_inputs()
    (logits,) = session.run(None, {given.name: other.numpy()})
    assert_near(torch.from_numpy(logits), model(other))


def onnx_of_any_batch(engine: Engine) -> None:
    _check(engine, (0,), torch.cat((TOKENS.flip(0), TOKENS.flip(1)[:1])))


def onnx_of_any_length(engine: Engine) -> None:
    _check(engine, (1,), torch.cat((TOKENS.flip(0), TOKENS[:, :7]), dim=1))
