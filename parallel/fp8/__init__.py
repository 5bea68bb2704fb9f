"""Linear layers that multiply in FP8: Transformer Engine's, or their emulation on any device."""
