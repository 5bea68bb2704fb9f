"""torch.compile of an injected model."""

from __future__ import annotations

import pytest
import torch

from models.amrpa import get_amrpa_loss
from tests.models.amrpa.tiny import ENCODERS, PAIRS, injected, inputs
from tests.tolerance import FP64


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_the_model_is_one_graph_for_all_steps_with_equal_losses_and_gradients(name):
    """fullgraph: a graph break is an error. transformers breaks at the loss of gpt2 by itself, with
    a warning, so that loss is taken here."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def steps(backend):
        layers = {"num_decoder_layers": 2, "num_layers": 2} if name in PAIRS else {}
        model = injected(name, layers, memory_noise=0.0).double().train()
        run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
        losses = []
        for seed in (1, 2):
            given = inputs(name, seed=seed)
            labels = given.get("decoder_input_ids", given["input_ids"])
            options = {} if name in ENCODERS else {"use_cache": False}
            if name == "gpt2":
                logits = run(**given, **options).logits
                losses.append(logits.square().mean() + get_amrpa_loss(model))
            else:
                losses.append(run(**given, **options, labels=labels).loss)
            losses[-1].backward()
        return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    torch._dynamo.reset()
    losses, gradients = steps(count)
    assert len(graphs) == 1
    expected, wanted = steps(None)
    torch.testing.assert_close(losses, expected, **FP64)
    torch.testing.assert_close(gradients, wanted, **FP64)
