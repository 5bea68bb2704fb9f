"""No source of the project executes data as code, apart from the listed exceptions."""

from __future__ import annotations

import pytest

from tests.hostile.dangerous_calls import ROOT, findings_in, sources

# File and rule -> why the call is there.
EXCEPTIONS = {
    ("pretrain/engine/deepspeed_files.py", "load_checkpoint"): (
        "DeepSpeed's own files, where only it can restore the optimizer: after their manifest has "
        "been compared, and never at another layout (SECURITY.md)"
    ),
    ("pretrain/distributed/consensus.py", "gather_object"): "what ranks of one job tell each other",
    (
        "pretrain/distributed/consensus.py",
        "broadcast_object_list",
    ): "what ranks of one job tell each other",
    ("pretrain/prove/ranks.py", "pickle"): "what a forked process tells its parent",
    ("pretrain/prove/exported.py", "trust_remote_code="): "code that the proof has just exported",
}

PLANTED = {
    "pickle": ["import pickle", "from pickle import loads", "import marshal", "import dill as d"],
    "torch.load": [
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f, weights_only=flag)",
    ],
    "numpy.load": ["import numpy as np\nnp.load(f)", "from numpy import load\nload(f)"],
    "yaml": [
        "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.unsafe_load(f)",
        "import yaml\nread(f, yaml.FullLoader)",
        "from yaml import full_load\nfull_load(f)",
    ],
    "text": ["eval(text)", "exec(text)", "import builtins\nbuiltins.eval(text)", "run = exec"],
    "shell": [
        "import os\nos.system(text)",
        "from os import popen\npopen(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "from subprocess import getoutput\ngetoutput(text)",
    ],
    "hub": ["AutoModel.from_pretrained(x, trust_remote_code=True)", "f(trust_remote_code=flag)"],
    "names": ["import tempfile\ntempfile.mktemp()"],
    "archives": ["tar.extractall(x)", "tar.extractall(x, filter='tar')"],
    "engines": ["engine.load_checkpoint(x)", "dist.all_gather_object(x, y)"],
}
HARMLESS = """
import subprocess, tempfile
import numpy as np, torch, yaml
model.eval()
torch.load(f, weights_only=True)
np.load(f, allow_pickle=False)
yaml.safe_load(f)
subprocess.run(["a", "b"], shell=False)
tar.extractall(x, filter="data")
AutoModel.from_pretrained(x, trust_remote_code=False)
re.compile("eval(x)")
"""


def test_no_source_calls_what_runs_data() -> None:
    found = [
        finding
        for path in sources()
        for finding in findings_in(
            path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        )
    ]
    used = {(finding.file, finding.rule) for finding in found}
    others = [str(finding) for finding in found if (finding.file, finding.rule) not in EXCEPTIONS]
    print(f"{len(sources())} files, {len(others)} dangerous calls, {len(EXCEPTIONS)} exceptions")
    assert others == []
    assert used == set(EXCEPTIONS), "an exception that nothing needs any more is taken out"


@pytest.mark.parametrize("rule", PLANTED)
def test_a_planted_line_is_found(rule: str) -> None:
    for line in PLANTED[rule]:
        assert findings_in(line, "planted.py"), line


def test_a_planted_line_of_a_shell_is_found() -> None:
    assert findings_in('x=1\n  eval "$x"\n', "planted.sh")
    assert findings_in("evaluate x\n# eval x\n", "planted.sh") == []


def test_harmless_lines_are_left_alone() -> None:
    assert findings_in(HARMLESS, "planted.py") == []
