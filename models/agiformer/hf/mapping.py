"""AGIFORMER in Hugging Face's form: its own names, and its own code."""

from __future__ import annotations

from models.hf.custom_code import own_code

HF = own_code("agiformer", "models.agiformer.hf.config", "AgiformerHFConfig")
