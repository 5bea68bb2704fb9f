"""One training step of litgpt and of OLMo-core, of the shape of a run of ours and with its weights.

Each is what the project's own training loop does, by its own functions: litgpt's `pretrain.fit`
with Fabric, OLMo-core's `TransformerTrainModule`. Only the optimizer is alike in all: torch's fused
AdamW, which litgpt asks for on CUDA alone. Both are among the packages of `make ecosystem`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data_tools.loading.batch import Batch
from pretrain.config import RunConfig
from pretrain.engine.phases import Phase
from tests.benchmarks.training import ADAMW, no_phase

LITGPT, OLMO = "litgpt", "OLMo-core"
_MODULES = {LITGPT: "litgpt", OLMO: "olmo_core"}


def missing() -> list[str]:
    """The peers that are not installed here."""
    return [name for name, module in _MODULES.items() if importlib.util.find_spec(module) is None]


class LitgptStep:
    """`litgpt.pretrain.fit`: Fabric's precision, its cross entropy in chunks of 128 tokens."""

    def __init__(self, config: RunConfig, *, compiled: bool) -> None:
        logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
        from lightning import Fabric
        from lightning.fabric.plugins.environments import LightningEnvironment
        from litgpt import GPT, Config
        from litgpt.utils import chunked_cross_entropy

        model = config.model
        precision: Any = "bf16-mixed" if config.training.precision == "bf16" else "32-true"
        # Named, because to look for one it imports mpi4py, which fails where there is no MPI.
        environment = LightningEnvironment()
        self.fabric = Fabric(accelerator="cpu", devices=1, precision=precision, plugins=environment)
        self.model = GPT(
            Config(
                block_size=config.data.sequence_length,
                padded_vocab_size=model.vocab_size,
                n_layer=model.num_layers,
                n_head=model.num_heads,
                n_query_groups=model.num_kv_heads,
                n_embd=model.hidden_size,
                intermediate_size=model.intermediate_size,
                norm_eps=model.rms_norm_eps,
                rope_base=int(model.rope_theta),
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
            )
        )
        self.model.transformer.wte.weight = self.model.lm_head.weight
        self._step = self.fabric.setup(torch.compile(self.model) if compiled else self.model)
        self.optimizer = self.fabric.setup_optimizers(
            torch.optim.AdamW(self.model.parameters(), **ADAMW)
        )
        self._loss: Callable[[Tensor, Tensor], Tensor] = chunked_cross_entropy
        self.phase: Phase = no_phase

    def load(self, weights: dict[str, Tensor], *, num_layers: int) -> None:
        """Take weights under Hugging Face's names for a llama."""
        own = {"lm_head": "model.embed_tokens", "transformer.ln_f": "model.norm"}
        for i in range(num_layers):
            theirs, layer = f"model.layers.{i}", f"transformer.h.{i}"
            own |= {
                f"{layer}.norm_1": f"{theirs}.input_layernorm",
                f"{layer}.norm_2": f"{theirs}.post_attention_layernorm",
                f"{layer}.attn.proj": f"{theirs}.self_attn.o_proj",
                f"{layer}.mlp.fc_1": f"{theirs}.mlp.gate_proj",
                f"{layer}.mlp.fc_2": f"{theirs}.mlp.up_proj",
                f"{layer}.mlp.proj": f"{theirs}.mlp.down_proj",
            }
        state = {f"{name}.weight": weights[f"{source}.weight"] for name, source in own.items()}
        state["transformer.wte.weight"] = state["lm_head.weight"]
        for i in range(num_layers):
            parts = (f"model.layers.{i}.self_attn.{part}_proj.weight" for part in "qkv")
            state[f"transformer.h.{i}.attn.qkv.weight"] = torch.cat([weights[p] for p in parts])
        self.model.load_state_dict(state)

    def __call__(self, batch: Batch) -> Tensor:
        with self.phase("data"):
            tokens, labels = batch[:2]
        with self.phase("forward"):
            loss = self._loss(self._step(tokens), labels)
        with self.phase("backward"):
            self.fabric.backward(loss)
        with self.phase("optimizer"):
            self.fabric.clip_gradients(self._step, self.optimizer, max_norm=1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


class OlmoStep:
    """`TransformerTrainModule`, without a data-parallel wrapper and without its metrics.

    To be built while torch.distributed is not initialised: it would ask for such a wrapper.
    """

    def __init__(self, config: RunConfig, *, compiled: bool) -> None:
        from olmo_core.nn.feed_forward import FeedForwardConfig
        from olmo_core.nn.transformer import TransformerConfig
        from olmo_core.optim import AdamWConfig
        from olmo_core.train.train_module import TransformerTrainModule

        model, tokens = config.model, config.training.batch_size * config.data.sequence_length
        built = TransformerConfig.llama_like(
            d_model=model.hidden_size,
            vocab_size=model.vocab_size,
            n_layers=model.num_layers,
            n_heads=model.num_heads,
            n_kv_heads=model.num_kv_heads,
            rope_theta=int(model.rope_theta),
            layer_norm_eps=model.rms_norm_eps,
            feed_forward=FeedForwardConfig(hidden_size=model.intermediate_size, bias=False),
            tie_word_embeddings=True,
        ).build(init_device="cpu")
        self.module = TransformerTrainModule(
            built,
            AdamWConfig(**ADAMW),
            rank_microbatch_size=tokens,
            max_sequence_length=config.data.sequence_length,
            autocast_precision=torch.bfloat16 if config.training.precision == "bf16" else None,
            max_grad_norm=1.0,
            device=torch.device("cpu"),
        )
        self.module._attach_trainer(_NoTrainer())  # type: ignore[arg-type]
        if compiled:
            self.module.model.apply_compile()  # which compile_model=True leaves out without CUDA
        self.module.model.train()
        self.phase: Phase = no_phase

    def load(self, weights: dict[str, Tensor], *, num_layers: int) -> None:
        """Take weights under Hugging Face's names for a llama."""
        own = {"embeddings": "model.embed_tokens", "lm_head.norm": "model.norm"}
        for i in range(num_layers):
            theirs, block = f"model.layers.{i}", f"blocks.{i}"
            own |= {
                f"{block}.attention_norm": f"{theirs}.input_layernorm",
                f"{block}.feed_forward_norm": f"{theirs}.post_attention_layernorm",
                f"{block}.attention.w_q": f"{theirs}.self_attn.q_proj",
                f"{block}.attention.w_k": f"{theirs}.self_attn.k_proj",
                f"{block}.attention.w_v": f"{theirs}.self_attn.v_proj",
                f"{block}.attention.w_out": f"{theirs}.self_attn.o_proj",
                f"{block}.feed_forward.w1": f"{theirs}.mlp.gate_proj",
                f"{block}.feed_forward.w2": f"{theirs}.mlp.down_proj",
                f"{block}.feed_forward.w3": f"{theirs}.mlp.up_proj",
            }
        state = {f"{name}.weight": weights[f"{source}.weight"] for name, source in own.items()}
        parameters: dict[str, nn.Parameter] = dict(self.module.model.named_parameters())
        if parameters.keys() != state.keys():
            raise RuntimeError(f"weights do not fit: {sorted(parameters.keys() ^ state.keys())}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    def __call__(self, batch: Batch) -> Tensor:
        with self.phase("data"):
            tokens, labels = batch[:2]
            count = (labels != -100).sum()
        with self.phase("forward"):
            output: Any = self.module.model_forward(
                tokens,
                labels=labels,
                ignore_index=-100,
                loss_reduction="sum",
                loss_div_factor=count,
                return_logits=False,
            )
        loss: Tensor = output.loss
        with self.phase("backward"):
            loss.backward()
        with self.phase("optimizer"):
            self.module.optim_step()
            self.module.zero_grads()
        return loss.detach()


class _NoTrainer:
    """What `TransformerTrainModule` reports to."""

    def record_metric(self, *args: Any, **kwargs: Any) -> None:
        """Drop it."""
