"""One training run: configuration, engine, loop, checkpoints and metrics."""

from pretrain.siblings import use_siblings

use_siblings("data_tools", "models", "parallel")
