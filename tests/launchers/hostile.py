"""Strings that run a command wherever a shell, Slurm or a launcher takes text for code."""

from __future__ import annotations

from pathlib import Path

_TEMPLATES = [
    "$(touch @)",
    "`touch @`",
    "; touch @",
    ";touch @;",
    "& touch @ &",
    "&& touch @",
    "|| touch @",
    "| touch @",
    "|touch @",
    "\ntouch @",
    "\ntouch @\n",
    "x\n#SBATCH --wrap=touch @",
    "'; touch @; '",
    '"; touch @; "',
    "'$(touch @)'",
    '"$(touch @)"',
    '"`touch @`"',
    "'`touch @`'",
    "\\$(touch @)",
    "\\\\$(touch @)",
    "\\`touch @\\`",
    '\\"; touch @; \\"',
    "\\'; touch @; \\'",
    "${x:-$(touch @)}",
    "${x:=`touch @`}",
    "a[$(touch @)]",
    "a[`touch @`]+1",
    "$((a[$(touch @)]))",
    "<(touch @)",
    ">(touch @)",
    "x <<< $(touch @)",
    "> @",
    ">> @",
    "2> @",
    "x; > @",
    "(touch @)",
    "{ touch @; }",
    "!touch @",
    "$'\\x24(touch @)'",
    "\t;\ttouch\t@",
    "%j$(touch @)%N",
    "%n%s%x`touch @`",
    "*;touch @",
    "~;touch @",
    "# \n touch @ #",
    "-oProxyCommand=touch @",
    "--prolog=touch @",
    "--task-prolog=touch @",
    "() { :; }; touch @",
    "\u00e9\u2028$(touch @)\u202e",
]


def hostile_strings(canary: Path) -> list[str]:
    """Fifty of them; whichever of them is run leaves a file `canary`."""
    return [template.replace("@", str(canary)) for template in _TEMPLATES]
