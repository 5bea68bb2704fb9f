"""Every place where a command of the project reads a file, with valid surroundings."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import zstandard

from data_tools.preprocessing.encoding import _tokenizer as load_once
from models.daria_former.standalone import cli as daria
from models.daria_former.standalone.model import DariaFormerModel
from models.daria_former.standalone.training import Trainer
from pretrain.config import to_yaml
from tests.data_tools.corpora import write_corpus
from tests.distributed import run_ranks
from tests.hostile.commands import Outcome, call, data_tool, tool, train
from tests.hostile.surfaces import TokenizerFile, vouch_for
from tests.models.checkpoints import config, write_checkpoint
from tests.models.daria_former.shrunk import shrunk
from tests.models.daria_former.standalone.torch_checkpoints import write_torch_checkpoint
from tests.pretrain.tiny_run import tiny_run, write_data


class Entry(NamedTuple):
    """A file and the command that reads it. `forged`: the checkpoint whose manifest then says that
    the file belongs there. `pack`: how the contents are packed, where the name says so."""

    name: str
    file: Path
    run: Callable[[], Outcome]
    forged: Path | None = None
    pack: Callable[[bytes], bytes] = bytes
    is_slow: bool = False


def entries(folder: Path) -> list[Entry]:
    """All of them, in folders of their own below `folder`."""
    made: list[Entry] = []
    for make in (
        _checkpoints,
        _daria_checkpoints,
        _foreign_models,
        _corpora,
        _texts,
        _tokenizers,
        _configs,
        _runs,
    ):
        own = folder / make.__name__.strip("_")
        own.mkdir()
        made += make(own)
    return made


def _checkpoints(folder: Path) -> list[Entry]:
    """A converted model, as everything that opens one reads it."""
    step, output = folder / "step_0", folder / "out"
    write_checkpoint(step, config())
    commands = {
        "convert to-hf": partial(_export, step, output),
        "generate": partial(
            tool, "models.generate", "--checkpoint", str(step), "--prompt", "x", "--device", "cpu"
        ),
        "checkpoint verify": partial(tool, "pretrain.checkpoint", "verify", str(step)),
        "checkpoint list": partial(tool, "pretrain.checkpoint", "list", str(step)),
    }
    weights = step / "weights" / "pp_00_tp_00.safetensors"
    made = []
    for name, run in commands.items():
        made.append(Entry(f"{name}: manifest.json", step / "manifest.json", run))
        made.append(Entry(f"{name}: weights", weights, run))
        made.append(Entry(f"{name}: weights, vouched for", weights, run, forged=step))
    return made


def _daria_checkpoints(folder: Path) -> list[Entry]:
    """What the standalone trainer writes, and the layout of the version before, whose optimizer
    state is a file of torch."""
    sizes = shrunk()
    stream = torch.randint(0, 257, (2, 25))
    batches = [(stream[:, :-1], stream[:, 1:])]

    def trainer() -> Trainer:
        return Trainer(DariaFormerModel(sizes), sizes, batches, max_steps=1, save_dir=folder)

    trained = trainer()
    trained.train()
    checkpoint, before = folder / "checkpoint-1", folder / "before"
    write_torch_checkpoint(trained, before)

    def generate(checkpoint: Path) -> Outcome:
        arguments = ["--checkpoint", str(checkpoint), "--prompt", "x", "--device", "cpu"]
        return call(partial(daria.generate, [*arguments, "--tokenizer", "bytes"]))

    def load(checkpoint: Path) -> int:
        try:
            trainer().load(checkpoint)
        except ValueError as error:  # as its callers print it
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    made = []
    for name in ("config.yaml", "model.safetensors"):
        made.append(Entry(f"daria-generate: {name}", before / name, partial(generate, before)))
    for root in (checkpoint, before):
        run = partial(call, partial(load, root))
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            made.append(Entry(f"Trainer.load: {path.name}", path, run))
            if root == checkpoint and path.name != "manifest.json":
                made.append(Entry(f"Trainer.load: {path.name}, vouched for", path, run, root))
    return made


def _export(step: Path, output: Path) -> Outcome:
    shutil.rmtree(output, ignore_errors=True)
    arguments = ("--checkpoint", str(step), "--output", str(output), "--no-tokenizer")
    return tool("models.convert", "to-hf", *arguments)


def _foreign_models(folder: Path) -> list[Entry]:
    """A Hugging Face directory: its files, a pickle beside them, code that config.json names."""
    step, model, output = folder / "step_0", folder / "model", folder / "out"
    write_checkpoint(step, config())
    assert _export(step, model).code == 0
    (model / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["code.T", null]}}'
    )
    (model / "tokenizer.json").write_text("{}")
    contents = json.loads((model / "config.json").read_text())
    contents["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (model / "config.json").write_text(json.dumps(contents))

    def run() -> Outcome:
        shutil.rmtree(output, ignore_errors=True)
        return tool("models.convert", "from-hf", "--model", str(model), "--output", str(output))

    names = (
        *("config.json", "model.safetensors", "model.safetensors.index.json", "code.py"),
        *("tokenizer.json", "tokenizer_config.json", "pytorch_model.bin", "__init__.py"),
    )
    return [Entry(f"convert from-hf: {name}", model / name, run) for name in names]


def _corpora(folder: Path) -> list[Entry]:
    prefix, other, output = folder / "corpus", folder / "other", folder / "out"
    for each in (prefix, other):
        write_corpus(each, [np.arange(1 + n) for n in range(9)], vocab_size=300)

    def without_output(*argv: str) -> Outcome:
        for old in folder.glob("out*"):
            old.unlink()
        return data_tool(*argv)

    commands = {
        "verify": partial(data_tool, "verify", str(prefix)),
        "inspect_corpus": partial(data_tool, "inspect_corpus", str(prefix)),
        "merge": partial(without_output, "merge", str(other), str(prefix), "--output", str(output)),
    }
    return [
        Entry(f"{name}: {suffix}", prefix.with_suffix(suffix), run)
        for name, run in commands.items()
        for suffix in (".bin", ".idx", ".json")
    ]


def _texts(folder: Path) -> list[Entry]:
    def run(module: str, source: str, *options: str) -> Outcome:
        for old in folder.glob("out*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        arguments = ("--input", source, "--output", str(folder / "out"))
        return data_tool(module, *arguments, *options)

    packings: dict[str, Callable[[bytes], bytes]] = {
        "in.jsonl": bytes,
        "in.txt": bytes,
        "in.jsonl.gz": bytes,
        "in.txt.zst": bytes,
        "packed.txt.gz": gzip.compress,
        "packed.jsonl.zst": zstandard.compress,
        "in.parquet": bytes,
    }
    made = [
        Entry(
            f"preprocess: {name}",
            folder / name,
            partial(
                run, "preprocess", str(folder / name), "--tokenizer", "bytes", "--workers", "1"
            ),
            pack=pack,
        )
        for name, pack in packings.items()
    ]
    saved = folder / "saved"
    saved.mkdir()
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    options = ("--tokenizer", "bytes", "--workers", "1")
    for name in ("state.json", "dataset_info.json", "data.arrow"):
        of_saved = partial(run, "preprocess", f"hf:{saved}", *options)
        made.append(Entry(f"preprocess hf:DIRECTORY: {name}", saved / name, of_saved))
    loaded = folder / "loaded"
    loaded.mkdir()
    for name in ("loaded.py", "data.json", "train-00000.tar"):
        of_loaded = partial(run, "preprocess", f"hf:{loaded}", *options)
        made.append(Entry(f"preprocess hf:DIRECTORY: {name}", loaded / name, of_loaded))
    return made


def _tokenizers(folder: Path) -> list[Entry]:
    valid = TokenizerFile(folder)

    def run(spec: str) -> Outcome:
        load_once.cache_clear()
        for old in folder.glob("out*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        arguments = ("--input", str(folder / "in.txt"), "--output", str(folder / "out"))
        return data_tool("preprocess", *arguments, "--tokenizer", spec, "--workers", "1")

    config_file = folder / "tokenizer_config.json"
    config_file.write_text('{"auto_map": {"AutoTokenizer": ["tokenization.T", null]}}')
    return [
        Entry("tokenizer.json", valid.file, partial(run, str(valid.file))),
        Entry("tokenizer_config.json", config_file, partial(run, str(valid.file))),
        Entry("tokenization.py", folder / "tokenization.py", partial(run, str(folder))),
        Entry("tokenizer.model", folder / "x.model", partial(run, str(folder / "x.model"))),
        Entry("tiktoken", folder / "x.tiktoken", partial(run, f"{folder / 'x.tiktoken'}:gpt2")),
    ]


def _configs(folder: Path) -> list[Entry]:
    write_data(folder)
    write_checkpoint(folder / "init" / "step_0", config())
    run_of = tiny_run(folder)
    (folder / "plain.yaml").write_text(to_yaml(run_of))
    (folder / "grouped.yaml").write_text(to_yaml(run_of) + "defaults: [{data: mine}, _self_]\n")
    (folder / "data").mkdir()
    (folder / "data" / "mine.yaml").write_text("num_workers: 1\n")

    def run(name: str, *options: str) -> Outcome:
        arguments = ("--config-name", name, "--config-dir", str(folder), "--print-run-dir")
        return train(*arguments, *options)

    epochs = ("~training.max_steps", "training.max_epochs=2")
    plain = partial(run, "plain")
    return [
        Entry("train: run file", folder / "spoilt.yaml", partial(run, "spoilt")),
        Entry("train: group file", folder / "data" / "mine.yaml", partial(run, "grouped")),
        Entry(
            "train: DeepSpeed JSON",
            folder / "ds.json",
            partial(run, "plain", "--ds_config", str(folder / "ds.json")),
        ),
        Entry("train: .bin counted", folder / "train.bin", partial(run, "plain", *epochs)),
        Entry("train: .idx counted", folder / "train.idx", partial(run, "plain", *epochs)),
        Entry("train: Python beside the run file", folder / "omegaconf.py", plain),
    ]


def _runs(folder: Path) -> list[Entry]:
    """A run that goes on: everything that it reads, with and without a manifest that vouches."""
    write_data(folder)
    run_of = tiny_run(folder)
    (folder / "first.yaml").write_text(to_yaml(tiny_run(folder, training__max_steps=2)))
    (folder / "more.yaml").write_text(to_yaml(run_of))

    def run(name: str, *options: str) -> Outcome:
        # DeepSpeed keeps the process groups of the first engine, so that there is one a process.
        arguments = ("--config-name", name, "--config-dir", str(folder), *options)
        return run_ranks(train, 1, *arguments, init=False)[0]

    first = run("first")
    assert first.code == 0, first
    run_dir = Path(run_of.run_dir)
    step = run_dir / "checkpoints" / "step_2"
    kept = folder / "kept"
    shutil.copytree(run_dir, kept)

    def resume() -> Outcome:
        try:
            return run("more")
        finally:  # where it went on, it has saved
            shutil.rmtree(run_dir)
            shutil.copytree(kept, run_dir)

    files = [path for path in sorted(step.rglob("*")) if path.is_file()]
    forgeable = [path for path in files if path.name != "manifest.json"]
    others = [run_dir / name for name in ("config.yaml", "metrics.jsonl", "checkpoints/latest")]

    def initial() -> Outcome:
        shutil.rmtree(folder / "new", ignore_errors=True)
        return run("more", f"training.init_from={step}", f"run_dir={folder / 'new'}")

    plot = partial(tool, "pretrain.plot", str(run_dir), "--output", str(folder / "loss.png"))
    made = [
        *(Entry(f"resume: {path.relative_to(run_dir)}", path, resume) for path in files),
        *(
            Entry(f"resume: {path.relative_to(run_dir)}, vouched for", path, resume, forged=step)
            for path in forgeable
        ),
        *(Entry(f"resume: {path.relative_to(run_dir)}", path, resume) for path in others),
        Entry("init_from: weights", files[-1], initial),
        Entry("init_from: weights, vouched for", files[-1], initial, forged=step),
    ]
    made = [entry._replace(is_slow=True) for entry in made]
    return [*made, Entry("plot: metrics.jsonl", run_dir / "metrics.jsonl", plot)]


def plant(entry: Entry, data: bytes) -> Callable[[], None]:
    """Put `data` in the place of the entry's file; returns what puts everything back."""
    touched = [entry.file, *([entry.forged / "manifest.json"] if entry.forged else [])]
    before = {path: path.read_bytes() if path.exists() else None for path in touched}
    entry.file.write_bytes(entry.pack(data))
    entry.file.chmod(0o755)
    if entry.forged is not None:
        vouch_for(entry.forged)

    def restore() -> None:
        for path, content in before.items():
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)

    return restore
