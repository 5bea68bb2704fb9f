"""The checkpoint format on disk: one reader and one writer, shared by all packages.

step_N/
    manifest.json   written last: size and sha256 of every file, layout, configuration
    weights/        pp_00_tp_00.safetensors ...: the model, readable at any layout
    ...             the rest of a run's state (pretrain/checkpointing)
"""
