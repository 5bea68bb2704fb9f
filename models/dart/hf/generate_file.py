"""The file of an exported directory that gives `generate` its other modes.

transformers runs `custom_generate/generate.py` of a directory for
`model.generate(..., custom_generate=directory, trust_remote_code=True)`, and in place of `generate`
once a model is loaded with its code. Source: transformers, documentation of generation strategies,
"Custom generation methods".
"""

from __future__ import annotations

GENERATE_FILE = "custom_generate/generate.py"
GENERATE_SOURCE = '''"""Generation of a DART in mode ar, diffusion or speculative."""


def generate(inputs=None, *args, model, **options):
    """Continue `inputs`; see `DARTForCausalLM.generate_in_mode`."""
    if options.get("custom_generate") is not None:
        return type(model).generate(model, inputs, *args, **options)
    return model.generate_in_mode(inputs, *args, **options)
'''
