"""The check of a model before it is built costs little at any size."""

from __future__ import annotations

import pytest

from parallel.carry import check_layers
from parallel.context import ParallelContext
from pretrain.config.deepspeed import resolve_ds_config
from pretrain.engine import train_spec
from pretrain.engine.train_spec import TrainSpec, check_model
from tests.models.families import CASES
from tests.pretrain.tiny_run import tiny_run


@pytest.mark.parametrize(
    ("length", "batch_size", "device"),
    [(32, 4, "cpu"), (2048, 1, "cpu"), (2048, 2, "meta"), (65536, 1, "meta")],
)
def test_attention_of_long_rows_is_not_computed(tmp_path, monkeypatch, length, batch_size, device):
    devices = []

    def checked(model, inputs, schema):
        devices.append(model.ctx.device.type)
        return check_layers(model, inputs, schema)

    monkeypatch.setattr(train_spec, "check_layers", checked)
    model = CASES["llama"].config.model_dump() | {"max_position_embeddings": length}
    data = {"data__sequence_length": length, "training__batch_size": batch_size}
    config = tiny_run(tmp_path, model=model, **data)
    ds_config = resolve_ds_config(None, config, data_size=1)
    whole = check_model(TrainSpec.of(config, ds_config, ParallelContext.single()))
    assert devices == [device]
    assert {parameter.device.type for parameter in whole.parameters()} == {"meta"}
