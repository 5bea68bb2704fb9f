"""AGIFORMER: bytes in patches, Hebbian memory, adaptive computation.

Importing this package imports no torch.
"""
