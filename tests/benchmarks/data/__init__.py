"""Benchmarks of reading, tokenizing and converting corpora."""
