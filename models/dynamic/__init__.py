"""Decoders whose layers compute only some tokens: mixture of depths, and surprise-based routing."""
