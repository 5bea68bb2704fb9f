"""`python -m tests.museum [--record] [--proofs | --quick] [NAME ...]`: what detects these exhibits.

Without names all are tried. `--proofs` tries with `pretrain.prove` alone, `--quick` with its quick
form alone. `--record` keeps what was found in results.json and in
the table of README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.museum.guide import record
from tests.museum.trial import ExhibitError, Verdict, try_exhibits


def main(argv: Sequence[str]) -> int:
    """0 when every exhibit is caught by a proof or the contract test, and by a test of its area."""
    parser = argparse.ArgumentParser(prog="python -m tests.museum", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="exhibits; default: all")
    parser.add_argument("--record", action="store_true", help="keep what is found in the table")
    parser.add_argument("--proofs", action="store_true", help="try pretrain.prove alone")
    parser.add_argument("--quick", action="store_true", help="try its quick form alone")
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.record:
        parser.error(
            "--quick with --record: the table is of complete proofs; leave one of them out"
        )
    verdicts: dict[str, Verdict] = {}
    try:
        how = {"proofs_only": arguments.proofs, "quick": arguments.quick}
        for name, verdict in try_exhibits(arguments.names, **how):
            _print(name, verdict)
            verdicts[name] = verdict
            if arguments.record:
                record({name: verdict})
    except ExhibitError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    missed = [name for name, verdict in verdicts.items() if not verdict.is_caught]
    print(f"exhibits: {len(verdicts) - len(missed)} of {len(verdicts)} caught")
    untested = [name for name, verdict in verdicts.items() if verdict.test == ""]
    return int(bool(missed or untested))


def _print(name: str, verdict: Verdict) -> None:
    print(f"{'caught' if verdict.is_caught else 'missed'}: {name}")
    for trial, found in verdict._asdict().items():
        if found is not None:
            print(f"    {trial}: {found or '-'}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
