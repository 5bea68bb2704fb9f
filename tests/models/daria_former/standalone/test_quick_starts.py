"""The published quick starts, as they stand but for the import path and, where said, the size."""

from __future__ import annotations

import pytest
import torch

from models.daria_former import DariaFormerConfig, DariaFormerModel
from models.daria_former.standalone.generation import DariaGenerator
from models.daria_former.standalone.lora import LoRAManager
from tests.models.daria_former.shrunk import shrunk


def test_create_a_model_of_the_small_size():
    config = DariaFormerConfig.small()  # ~125M params
    model = DariaFormerModel(config)

    assert f"Parameters: {model.count_parameters():,}" == "Parameters: 121,524,633"

    # Forward pass, of 64 tokens instead of 512
    input_ids = torch.randint(0, config.vocab_size, (1, 64))
    with torch.no_grad():
        outputs = model(input_ids, return_emotion=True)
    assert outputs["logits"].shape == (1, 64, config.vocab_size)
    assert outputs["emotion_state"].shape == (1, config.emotion_dim)


def test_forward_pass():
    config = shrunk()
    model = DariaFormerModel(config)
    input_ids = torch.randint(0, config.vocab_size, (1, 512))
    outputs = model(input_ids, return_emotion=True)
    assert outputs["logits"].shape == (1, 512, config.vocab_size)
    assert outputs["emotion_state"].shape == (1, config.emotion_dim)


def test_the_small_size_takes_images_and_sound():
    config = DariaFormerConfig.small()
    config.image_enabled = True
    config.audio_enabled = True
    model = DariaFormerModel(config, device="meta")
    outputs = model(
        input_ids=torch.randint(0, 256, (1, 128), device="meta"),
        images=torch.randn(1, 3, 224, 224, device="meta"),
        audio=torch.randn(1, 80, 1000, device="meta"),
    )
    assert outputs["logits"].shape == (1, 128, config.vocab_size)


def test_with_multimodal_inputs():
    config = shrunk()
    config.image_enabled = True
    config.audio_enabled = True
    model = DariaFormerModel(config).eval()
    inputs = {
        "input_ids": torch.randint(0, 256, (1, 128)),
        "images": torch.randn(1, 3, 224, 224),
        "audio": torch.randn(1, 80, 1000),
    }
    outputs = model(**inputs)
    assert outputs["logits"].shape == (1, 128, config.vocab_size)
    assert model.image_encoder(inputs["images"]).shape[0] == 196
    assert model.audio_encoder(inputs["audio"]).shape[0] == 500
    changed = model(**inputs | {"audio": torch.randn(1, 80, 1000)})
    assert not torch.equal(changed["logits"], outputs["logits"])


def test_lora_injection():
    model = DariaFormerModel(shrunk())
    manager = LoRAManager(model, rank=16, alpha=32, targets=["q_proj", "v_proj"])
    manager.inject()
    manager.freeze_base()

    # Add persona adapter
    manager.add_adapter("persona_style", rank=8)
    manager.activate_adapter("persona_style")

    # Runtime switching
    manager.deactivate_adapter("persona_style")
    with pytest.warns(UserWarning, match="was added"):
        manager.activate_adapter("emotion_intense", weight=0.5)
    model(torch.tensor([[1, 2, 3]]))


def test_generation():
    model = DariaFormerModel(shrunk())
    generator = DariaGenerator(model)
    output_ids = generator.generate(
        input_ids=torch.tensor([[1, 2, 3]]),
        max_new_tokens=100,
        temperature=0.8,
        top_p=0.9,
    )
    assert output_ids.shape == (1, 103)


def test_training():
    from models.daria_former.standalone.training import DariaFormerLoss, Trainer, build_optimizer

    config = shrunk()
    model = DariaFormerModel(config)
    stream = torch.randint(0, 16, (4, 33))
    train_loader = [(stream[:, :-1], stream[:, 1:])]
    trainer = Trainer(
        model=model,
        config=config,
        train_dataloader=train_loader,
        lr=1e-3,
        max_steps=6,
        use_amp=True,
        log_every=1,
    )
    history = trainer.train()
    assert history[-1]["lm_loss"] < history[0]["lm_loss"]
    assert build_optimizer(model, lr=1e-4).param_groups
    losses = DariaFormerLoss(config)(logits=torch.randn(1, 8, 257), labels=stream[:1, :8])
    assert losses["loss"] > 0
