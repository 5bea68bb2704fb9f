"""Daria-Former in Hugging Face's form: its own names, and its own code."""

from __future__ import annotations

from models.hf.custom_code import own_code

HF = own_code("daria_former", "models.daria_former.hf.config", "DariaFormerHFConfig")
