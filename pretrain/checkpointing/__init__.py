"""Checkpoints: published atomically, verified before use.

    RUN/checkpoints/step_N/
        optimizer/  rank_00000.safetensors ...: fp32 masters, moments and step counts
        weights/    pp_00_tp_00.safetensors ...: weights only, for generate and convert
        rng/        rank_00000.safetensors ...: states of the random generators
        trainer.json    state of the loop: steps, tokens, position in the data
        index.json      which of these files holds which elements of which parameter
        manifest.json   written last: size and sha256 of every file above, layout, configuration
    RUN/checkpoints/latest    a hint for people; resuming looks at the directories
    RUN/checkpoints/rollbacks.json    data that the run skips since a loss spike; after one

Any layout reads what it needs from these files, without conversion: rank 0 reads the index for all,
and a rank opens the files that hold something of it, once each. Where only DeepSpeed can
restore the optimizer (`config.deepspeed.layout_bound_by`), `engine/` holds its own pickled files
instead of `optimizer/`, and the run resumes at the layout that wrote them.

`python -m pretrain.checkpoint list|verify|prune DIR` inspects checkpoints, or deletes old ones.
"""

from parallel.checkpoint.errors import CheckpointError
from parallel.checkpoint.manifest import Layout
from pretrain.checkpointing.rank_files import CheckpointContents
from pretrain.checkpointing.selection import Checkpoint, RunIdentity
from pretrain.checkpointing.store import CheckpointStore

__all__ = [
    "Checkpoint",
    "CheckpointContents",
    "CheckpointError",
    "CheckpointStore",
    "Layout",
    "RunIdentity",
]
