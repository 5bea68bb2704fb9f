"""One training run: configuration, engine, loop, checkpoints and metrics."""
