"""Checkpoints to Hugging Face directories and back, and to GGUF. Nothing is unpickled.

    python -m models.convert to-hf --checkpoint DIR --output DIR [--dtype bf16|fp32]
        [--max-shard-size 5GB] [--tokenizer SPEC | --no-tokenizer] [--eod TOKEN] [--plain]
    python -m models.convert from-hf --model DIR --output DIR [--dtype bf16|fp32]
        [--family NAME [--set KEY=VALUE ...] [--from-scratch]]
    python -m models.convert to-gguf --checkpoint DIR --output FILE [--dtype f32|f16|bf16]
        [--tokenizer SPEC | --no-tokenizer] [--eod TOKEN]

`to-hf` reads a checkpoint (`step_N`) of any layout, or the newest one of a run directory, and
writes a directory that transformers loads. `from-hf` writes a checkpoint from which training can
start and text be generated. Both need memory for about one shard, and neither writes into a
directory that holds anything. A model that transformers does not have is exported with its code;
code that a directory brings is never run here. `to-gguf` writes one file for llama.cpp, of a model
whose function one of llama.cpp's models computes.

`--family`: import as a family that is initialised from the model in the directory, with its
weights; `--set` changes settings (values as in JSON), and `--from-scratch` takes the settings only.
`--plain`: export such a model as its base model, without the parameters that the family adds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.program import program
from parallel.checkpoint.newest import find_manifest

# torch takes seconds, for which --help and a mistake do not wait: functions import what needs it.
if TYPE_CHECKING:
    import torch

    from models.checkpoint import StoredModel
    from models.hf.declared import Declared, OwnTokens
    from models.hf.tokenizer_files.export import Exported

_CODE_REMARK = (
    "the directory holds the model's code: load it with from_pretrained(..., "
    "trust_remote_code=True), which needs transformers, torch and pydantic"
)
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_GGUF_DTYPES = ("bf16", "f16", "f32")
_EXAMPLE = """example:
  %(prog)s to-hf --checkpoint runs/demo --output exported/
  %(prog)s from-hf --model Llama-3.2-1B/ --output imported/
  %(prog)s to-gguf --checkpoint runs/demo_llama --output demo.gguf
"""


def to_hf(
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    with_tokenizer: bool = True,
    eod: str | None = None,
    plain: bool = False,
) -> list[str]:
    """Export a checkpoint; returns remarks for the user.

    `tokenizer` replaces the one named by the checkpoint, `eod` the token that ended the training
    documents, which becomes the end token of the export. `plain`: export the transformers model
    that the family was initialised from, without the parameters that it adds.

    Raises:
        ValueError: the checkpoint, the output or the tokenizer cannot be used, or the model has no
            plain form.
    """
    from models.checkpoint import open_checkpoint
    from models.hf.base_model import plain_model
    from models.hf.declared import OwnTokens, declared_of
    from models.hf.export_weights import export_configuration, export_weights
    from models.registry import model_type_owners

    stored = open_checkpoint(checkpoint)
    family = stored.family
    model_type_owners()  # whatever is written can be read by one family alone
    hf = plain_model(family, stored.config) if plain else family.require_hf()
    spec = (tokenizer or stored.tokenizer) if with_tokenizer else None
    if spec is None and eod is not None:
        raise ValueError(f"--eod {eod} has no effect without a tokenizer; remove it")
    declared, remarks = declared_of(stored)
    with _published(output) as folder:
        export_configuration(stored, folder, hf=hf, dtype=dtype)
        # Before the weights: errors of the tokenizer should not wait for them.
        if spec is None:
            remarks.append("no tokenizer files were written")
            own = OwnTokens(stored.text.eod_id)
        else:
            written = _write_tokenizer(spec, folder, stored, eod=eod)
            remarks, own = [*remarks, *written.remarks], written.tokens
        _write_declared(folder, stored, declared, own)
        export_weights(stored, folder, hf=hf, dtype=dtype, max_shard_size=max_shard_size)
    if plain:
        remarks.append("the plain model computes every token in every layer")
    return [*remarks, _CODE_REMARK] if hf.code else remarks


def from_hf(
    model: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    changes: Mapping[str, Any] | None = None,
    from_scratch: bool = False,
) -> list[str]:
    """Import a Hugging Face directory as a checkpoint; returns remarks for the user.

    `family`: one that can be initialised from the model in the directory, with `changes` to its
    settings; `from_scratch`: without its weights.

    Raises:
        ValueError: the model type is not supported, or the model is damaged or not safetensors.
    """
    from models.checkpoint import StoredModel, write_manifest
    from models.hf.base_model import import_base_weights, read_base_config
    from models.hf.declared import read_declared, write_declared
    from models.hf.import_weights import (
        has_unread_index,
        import_weights,
        read_contents,
        read_foreign_config,
    )

    remarks = []
    if family is None:
        foreign = read_foreign_config(model)
    else:
        foreign = read_base_config(model, family, changes or {}, from_scratch=from_scratch)
    with _published(output) as folder:
        (folder / "weights").mkdir()
        if family is None:
            import_weights(foreign, folder / "weights", dtype=dtype)
        else:
            taken = import_base_weights(
                foreign, folder / "weights", dtype=dtype, from_scratch=from_scratch
            )
            remarks.append(f"{len(taken)} tensors are those of {model}; all others are new")
        declared = read_declared(model, read_contents(model / "config.json"))
        write_declared(folder, declared)
        has_tokenizer = _import_tokenizer(model, folder / "tokenizer", declared)
        spec = str((output / "tokenizer").absolute()) if has_tokenizer else None
        stored = StoredModel(folder / "weights", foreign.family, foreign.config, spec)
        write_manifest(folder, stored)
    if not has_tokenizer:
        remarks.append(f"{model} has no tokenizer files; none were copied")
    if has_unread_index(model):
        remarks.append(
            f"{model}: model.safetensors was read, as transformers does, and not the shards of "
            "model.safetensors.index.json"
        )
    return remarks


def _import_tokenizer(model: Path, folder: Path, declared: Declared) -> bool:
    """Copy the tokenizer files; False when the directory has none."""
    from models.hf.declared import GENERATION_CONFIG, OwnTokens, generation_contents
    from models.hf.export_weights import write_json
    from models.hf.tokenizer_files.export import copy_tokenizer

    ends = generation_contents(declared, OwnTokens()).generation
    has_tokenizer = copy_tokenizer(model, folder)
    if has_tokenizer and ends:  # which may be alone in saying what ends a text
        write_json(folder / GENERATION_CONFIG, ends)
    return has_tokenizer


def _write_tokenizer(spec: str, folder: Path, stored: StoredModel, *, eod: str | None) -> Exported:
    """Write the tokenizer files; returns remarks, and the tokens that the files name."""
    from data_tools.tokenization.tokenizers import (
        load_tokenizer,
        split_tiktoken_spec,
        tokenizer_file,
    )
    from models.hf.tokenizer_files.check import Training
    from models.hf.tokenizer_files.export import export_byte_tokenizer, export_tokenizer_files

    if split_tiktoken_spec(spec) is not None:
        raise ValueError(
            f"tokenizer {spec}: ranks of tiktoken have no form that transformers loads; give an "
            "equal tokenizer.json with --tokenizer, or pass --no-tokenizer to export the model "
            "without it"
        )
    tokenizer = load_tokenizer(spec, eod=stored.text.eod_id if eod is None else eod)
    remarks = []
    if tokenizer.vocab_size > stored.config.vocab_size:
        remarks.append(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {stored.config.vocab_size}: "
            f"give it no text with the others, such as "
            f"{tokenizer.id_to_token(tokenizer.vocab_size - 1)}"
        )
    if tokenizer.eod_id is None:
        remarks.append("the tokenizer names no end token, so generation will not end by itself")
    elif tokenizer.eod_id >= stored.config.vocab_size:
        raise ValueError(
            f"tokenizer {spec} ends a text with id {tokenizer.eod_id}, the model has "
            f"{stored.config.vocab_size}; give the tokenizer of its data with --tokenizer, or the "
            "end token with --eod"
        )
    training = Training(tokenizer.encode, tokenizer.decode, getattr(tokenizer, "save", None))
    if spec == "bytes":
        written = export_byte_tokenizer(folder, training)
    else:
        written = export_tokenizer_files(
            tokenizer_file(spec), folder, training, eod_id=tokenizer.eod_id
        )
    return written._replace(remarks=[*remarks, *written.remarks])


def _write_declared(folder: Path, stored: StoredModel, declared: Declared, own: OwnTokens) -> None:
    """generation_config.json, and in config.json the tokens that begin, end and fill up texts."""
    from models.hf.declared import GENERATION_CONFIG, OwnTokens, generation_contents
    from models.hf.export_weights import write_json
    from models.hf.import_weights import read_contents

    if stored.text.bos_ids is not None and len(stored.text.bos_ids) == 1:
        own = own._replace(begin=stored.text.bos_ids[0])
    known = (i if i is None or i < stored.config.vocab_size else None for i in own)
    contents = generation_contents(declared, OwnTokens(*known))
    path = folder / "config.json"
    write_json(path, read_contents(path) | contents.ids)
    write_json(folder / GENERATION_CONFIG, contents.generation)


@contextlib.contextmanager
def _published(output: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `output` if the body succeeds, and removed otherwise.

    Raises:
        ValueError: `output` exists and is not an empty directory.
    """
    _refuse_to_overwrite(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkdtemp: who may read the model is up to the user's umask.
    folder = output.parent / f".{output.name}-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        yield folder
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _check_directory(model: Path) -> None:
    """Before anything is imported that takes seconds.

    Raises:
        ValueError: it is no model directory, such as a name on the Hub.
    """
    if not (model / "config.json").is_file():
        raise ValueError(
            f"--model {model}: no config.json in {model.absolute()}; give the directory of a model "
            "on this machine, such as `hf download NAME --local-dir DIR` makes"
        )


def _refuse_to_overwrite(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty; choose another --output")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parse(argv)
    try:
        if arguments.command == "from-hf":
            _check_directory(arguments.model)
        else:
            find_manifest(arguments.checkpoint)
        _refuse_to_overwrite(arguments.output)
        changes = _changes(arguments) if arguments.command == "from-hf" else {}
        remarks = _run(arguments, changes)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in (*remarks, f"wrote {arguments.output}"):
        print(line)
    return 0


def _run(arguments: argparse.Namespace, changes: Mapping[str, Any]) -> list[str]:
    """The conversion that is asked for; returns remarks for the user."""
    if arguments.command == "to-gguf":
        from models.gguf.export import to_gguf

        return to_gguf(
            arguments.checkpoint,
            arguments.output,
            dtype=arguments.dtype,
            tokenizer=arguments.tokenizer,
            with_tokenizer=not arguments.no_tokenizer,
            eod=arguments.eod,
        )
    import torch

    dtype = None if arguments.dtype is None else getattr(torch, _DTYPES[arguments.dtype])
    if arguments.command == "from-hf":
        return from_hf(
            arguments.model,
            arguments.output,
            dtype=dtype,
            family=arguments.family,
            changes=changes,
            from_scratch=arguments.from_scratch,
        )
    return to_hf(
        arguments.checkpoint,
        arguments.output,
        dtype=dtype,
        max_shard_size=arguments.max_shard_size,
        tokenizer=arguments.tokenizer,
        with_tokenizer=not arguments.no_tokenizer,
        eod=arguments.eod,
        plain=arguments.plain,
    )


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of `--set`."""
    if arguments.family is None and (arguments.set or arguments.from_scratch):
        raise ValueError("--set and --from-scratch have no effect without --family; give it")
    changes: dict[str, Any] = {}
    for entry in arguments.set:
        name, equals, text = entry.partition("=")
        if not (name and equals) or name in changes:
            raise ValueError(f"--set {entry}: give each setting once, as KEY=VALUE")
        try:
            changes[name] = json.loads(text)
        except json.JSONDecodeError:
            changes[name] = text
    return changes


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("python -m models.convert"),
        description="Checkpoints to Hugging Face and back, and to GGUF; see COMMAND --help.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser("to-hf", help="write a directory that transformers loads")
    export.add_argument("--max-shard-size", default="5GB", help="of a weight file (default: 5GB)")
    export.add_argument(
        "--plain", action="store_true", help="as the base model that the family extends"
    )
    single = commands.add_parser("to-gguf", help="write a file that llama.cpp loads")
    for command in (export, single):
        command.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint or a run")
        choice = command.add_mutually_exclusive_group()
        choice.add_argument("--tokenizer", help="instead of the one that the checkpoint names")
        choice.add_argument("--no-tokenizer", action="store_true", help="write the model only")
        command.add_argument(
            "--eod",
            metavar="TOKEN",
            help="end token; default: what ended the documents of training",
        )
    load = commands.add_parser("from-hf", help="write a checkpoint from a Hugging Face directory")
    load.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    load.add_argument("--family", help="a family that extends the model in the directory")
    load.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of it"
    )
    load.add_argument(
        "--trunk", action="append", default=[], dest="set", type="trunk={}".format,
        metavar="NAME", help="--set trunk=NAME",
    )  # fmt: skip
    load.add_argument("--from-scratch", action="store_true", help="take no weights")
    outputs = {
        export: ("a new directory", _DTYPES),
        load: ("a new directory", _DTYPES),
        single: ("a new file", _GGUF_DTYPES),
    }
    for command, (what, dtypes) in outputs.items():
        command.add_argument("--output", type=Path, required=True, help=what)
        command.add_argument("--dtype", choices=sorted(dtypes), help="default: as stored")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
