"""Keys and passwords do not belong into a configuration: it is written to the run directory, to
every checkpoint and to W&B, and printed by job scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pretrain.config.leaves import leaves
from pretrain.errors import ConfigError

# Not `tokens` and `tokenizer`.
_KEY = re.compile(r"(?i)api_?key|access_?key|token(?!s|iz)|secret|passw|credential")
_IN_URL = re.compile(
    r"(?i)://[^/\s@]*:[^/\s@]+@|[?&](sig|signature|token|x-amz-\w+|access_?key|password)="
)


def check_credentials(values: Mapping[str, Any]) -> None:
    """Refuse a text under a name of credentials, and a URL that holds some; never show them.

    Raises:
        ConfigError: names the setting and says where such things belong.
    """
    for key, value in leaves(values):
        if isinstance(value, str) and _KEY.search(key):
            raise _refusal(key, "is a name of credentials")
        if isinstance(value, str) and _IN_URL.search(value):
            raise _refusal(key, "holds a URL with credentials in it")


def check_override(override: str) -> None:
    """`check_credentials` of `key=value` as it stands on a command line, whatever the value says.

    Raises:
        ConfigError: see there.
    """
    key, _, value = override.partition("=")
    check_credentials({key.lstrip("+~")[:80]: value})


def _refusal(key: str, what: str) -> ConfigError:
    return ConfigError(
        f"{key} {what}, and a configuration is written down in many places; leave it out and set "
        "the variable of the environment that the service reads (WANDB_API_KEY, HF_TOKEN, AWS_*)"
    )
