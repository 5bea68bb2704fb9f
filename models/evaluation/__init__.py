"""Scores and continuations of a checkpoint of any family, for evaluation harnesses."""
