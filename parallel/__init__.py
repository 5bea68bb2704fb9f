"""Parallel building blocks: context, layers, carry, wire, pipeline. Knows no model family."""
