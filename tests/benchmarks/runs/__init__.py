"""Benchmarks of complete runs on several ranks."""
