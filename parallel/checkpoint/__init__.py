"""The checkpoint format: one reader and one writer for all packages that meet it on a disk.

step_N/
    manifest.json   written last: size and sha256 of every file, layout, configuration
    weights/        pp_00_tp_00.safetensors ...: the model, readable at any layout
    ...             what else a run keeps (pretrain/checkpointing)
"""
