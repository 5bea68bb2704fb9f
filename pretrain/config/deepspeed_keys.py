"""Accepted and refused keys of the DeepSpeed JSON, as data; from DeepSpeed 0.19.8.

DeepSpeed ignores unknown keys outside a few sections, so a misspelt one would have no effect.
`tests/pretrain/config/test_deepspeed_keys.py` compares these tables with the installed DeepSpeed.

An accepted key trains like a single process, at every layout that accepts it:
`tests/pretrain/engine/test_ds_options.py` tries every key at every kind of layout. Keys that do
not, and keys that no test can try, are refused.
"""

from __future__ import annotations

from typing import Any

# Value kinds: a type; a tuple of choices; a dict for a section of its own.
_OFFLOAD: dict[str, Any] = {"device": ("none", "cpu"), "pin_memory": bool}

ZERO: dict[str, Any] = {
    "stage": (0, 1, 2, 3),
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_bucket_size": int,
    "overlap_comm": bool,
    "offload_param": _OFFLOAD,
    "offload_optimizer": _OFFLOAD,
    "sub_group_size": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "stage3_allgather_sequential": bool,
    "ignore_unused_parameters": bool,
    "round_robin_gradients": bool,
    "parameter_alignment": bool,
    "memory_efficient_linear": bool,
    "override_module_apply": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
}

# Read by ZeRO-3 alone, besides everything named stage3_*.
STAGE_3_ONLY = frozenset(
    {
        "enable_sanity_checks",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "offload_param",
        "override_module_apply",
        "sub_group_size",
    }
)

ACCEPTED: dict[str, Any] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "steps_per_print": int,
    "bf16": {"enabled": bool, "immediate_grad_update": bool, "check_grad_overflow": bool},
    "data_types": {"grad_accum_dtype": ("fp32", "bf16", "fp16")},
    "zero_optimization": ZERO,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "pipeline": {"pipe_partitioned": bool, "grad_partitioned": bool},
    "communication_data_type": ("fp32", "bf16"),
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "disable_python_gc": bool,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "comms_logger": {
        "enabled": bool,
        "prof_all": bool,
        "prof_ops": list,
        "verbose": bool,
        "debug": bool,
    },
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
}

_LOGGING = "set logging.tensorboard or logging.wandb in the run configuration"
_DATA = "the data section of the run configuration decides this"
_CHECKPOINT = "set checkpoint.* in the run configuration"
_REMOVED = "DeepSpeed has removed it"
_NO_EFFECT = "it has no effect here"
_NVME = "offloading to NVMe is not supported; offload to the device cpu"
_EIGHT_BITS = "communication would be rounded to 8 bits"
_NO_SCALING = "gradients are summed in fp32 or bf16, whose range needs no scaling"
_FAILS = "DeepSpeed 0.19.8 then finds parameters empty in a step"

# Keys that DeepSpeed knows and that are refused here -> reason, and remedy.
REFUSED: dict[str, str] = {
    "optimizer": "set training.optimizer, lr, betas, eps and weight_decay in the run configuration",
    "scheduler": "set training.schedule, warmup_steps and min_lr_ratio in the run configuration",
    "fp16": "fp16 is not supported; set training.precision=bf16",
    "bfloat16": "write bf16, the current name",
    "torch_autocast": "set training.precision in the run configuration",
    "bf16.bf16_master_weights_and_grads": "master weights stay in fp32",
    "bf16.bf16_optimizer_states": "optimizer states stay in fp32",
    "data_types.param_dtype": "set training.precision in the run configuration",
    "data_types.buffer_dtype": "buffers such as rotary frequencies keep their precision",
    "data_types.keep_in_fp32_modules": "the layers decide what stays in fp32",
    "pipeline.stages": "set parallel.pipeline in the run configuration",
    "pipeline.partition": "stages are cut by number of layers",
    "pipeline.seed_layers": "weights are seeded by training.seed at every layout",
    "pipeline.activation_checkpoint_interval": "set training.activation_recomputation",
    "pipeline.use_reentrant": "set training.activation_recomputation",
    "activation_checkpointing": "set training.activation_recomputation in the run configuration",
    "compile": "set training.compile in the run configuration",
    "tensor_parallel": "set parallel.tensor in the run configuration",
    "expert_parallel": "set parallel.expert in the run configuration",
    "use_data_before_expert_parallelism": "expert ranks are neighbours among the data ranks",
    "sequence_parallel_size": "parallel.context is reserved",
    "data_parallel_size": "it follows from the world size and the parallel section",
    "seq_parallel_communication_data_type": "parallel.context is reserved",
    "checkpoint": _CHECKPOINT,
    "datastates_ckpt": _CHECKPOINT,
    "tensorboard": _LOGGING,
    "wandb": _LOGGING,
    "csv_monitor": "metrics.jsonl in the run directory has every logged value",
    "comet": _LOGGING,
    "data_efficiency": _DATA,
    "dataloader_drop_last": _DATA,
    "vocabulary_size": "set model.vocab_size in the run configuration",
    "managed_gradient_accumulation": "set training.gradient_accumulation_steps",
    "gradient_allreduce_op": "gradients are means over data ranks",
    "prescale_gradients": _NO_SCALING,
    "gradient_predivide_factor": _NO_SCALING,
    "aio": _NVME,
    "disable_allgather": _NO_EFFECT,
    "hybrid_engine": "it serves reinforcement learning",
    "autotuning": "set the batch and the ZeRO stage by hand",
    "weight_quantization": "it serves inference",
    "amp": f"{_REMOVED}; set training.precision",
    "compression_training": _REMOVED,
    "curriculum_learning": f"{_REMOVED}; {_DATA}",
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED,
    "graph_harvesting": _REMOVED,
    "nebula": f"{_REMOVED}; {_CHECKPOINT}",
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "zero_optimization.allgather_partitions": _NO_EFFECT,
    "zero_optimization.load_from_fp32_weights": "a run continues from its fp32 master weights",
    "zero_optimization.stage3_module_granularity_threshold": _FAILS,
    "zero_optimization.leaf_module": _FAILS,
    "zero_optimization.zero_hpz_partition_size": "DeepSpeed 0.19.8 makes its groups once per layer "
    "that is partitioned, and fails at the second",
    "zero_optimization.zero_quantized_weights": _EIGHT_BITS,
    "zero_optimization.zero_quantized_nontrainable_weights": _EIGHT_BITS,
    "zero_optimization.zero_quantized_gradients": _EIGHT_BITS,
    "zero_optimization.offload_param.nvme_path": _NVME,
    "zero_optimization.offload_param.buffer_count": _NVME,
    "zero_optimization.offload_param.buffer_size": _NVME,
    "zero_optimization.offload_param.max_in_cpu": _NVME,
    "zero_optimization.offload_optimizer.nvme_path": _NVME,
    "zero_optimization.offload_optimizer.buffer_count": _NVME,
    "zero_optimization.offload_optimizer.pipeline_read": _NVME,
    "zero_optimization.offload_optimizer.pipeline_write": _NVME,
    "zero_optimization.offload_optimizer.fast_init": _NVME,
    "zero_optimization.offload_optimizer.ratio": "all of the optimizer is offloaded, or nothing",
    "zero_optimization.offload_optimizer.super_offload": "it is a trainer of its own",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "super_offload alone reads it",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": "write pin_memory in the offload sections",
    # On CPU deepspeed.initialize itself moved the weights by up to 0.5 with this section.
    "zero_optimization.zenflow": "its initialisation changes the weights",
    "zero_optimization.compute_grad_norm": "every step reports its gradient norm",
    "zero_optimization.elastic_checkpoint": _CHECKPOINT,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINT,
    "zero_optimization.legacy_stage1": "DeepSpeed no longer has it",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINT,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "Muon does not run at stage 3 here",
}
