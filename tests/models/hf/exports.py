"""Models of the families in the form that transformers loads, without a directory."""

from __future__ import annotations

from typing import Any

import torch

from models.agiformer import AgiformerForCausalLM, AgiformerHFConfig
from models.amrpa import AMRPALlamaForCausalLM, AMRPALlamaHFConfig
from models.daria_former import DariaFormerForCausalLM, DariaFormerHFConfig
from models.dart import DARTForCausalLM, DARTHFConfig
from models.dynamic import DTFForCausalLM, DTFHFConfig, MoDForCausalLM, MoDHFConfig
from models.hf.modeling import FamilyForCausalLM
from tests.models.checkpoints import model
from tests.models.families import CASES, evaluated

_CLASSES = {
    "agiformer": (AgiformerForCausalLM, AgiformerHFConfig),
    "amrpa": (AMRPALlamaForCausalLM, AMRPALlamaHFConfig),
    "daria_former": (DariaFormerForCausalLM, DariaFormerHFConfig),
    "dart": (DARTForCausalLM, DARTHFConfig),
    "mod": (MoDForCausalLM, MoDHFConfig),
    "dtf": (DTFForCausalLM, DTFHFConfig),
}
EXPORTED = tuple(name for name, case in CASES.items() if case.family.name in _CLASSES)
# One of each family, where variants would say the same.
FAMILIES = tuple(_CLASSES)
# Those with a hidden state for every token.
TOKEN_STATES = tuple(name for name in FAMILIES if _CLASSES[name][0].has_token_states)
EXPORTED_TOKEN_STATES = tuple(k for k in EXPORTED if CASES[k].family.name in TOKEN_STATES)
TOKENS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(5))


def exported(kind: str, **changes: Any) -> FamilyForCausalLM:
    """In evaluation and fp32, with gates and gains away from where they start and thresholds that
    have seen tokens. `changes`: of the configuration."""
    family, config = CASES[kind]
    config = config.model_copy(update=changes)
    whole = model(config, family)
    if family.name != "daria_former":
        whole = evaluated(whole.train(), TOKENS)
    model_class, config_class = _CLASSES[family.name]
    theirs = model_class(config_class.from_settings(config))
    theirs.model.load_state_dict(whole.state_dict())
    return theirs.eval()
