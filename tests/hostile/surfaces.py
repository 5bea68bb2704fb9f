"""Readers of text or files written by others, and ways to spoil a valid input of each.

A surface makes its valid input once, and then attempts: a spoilt copy of it, the command that reads
it, whether the command must refuse it, and otherwise what shows that it was understood.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_tools.preprocessing.encoding import _tokenizer as load_once
from parallel.checkpoint.manifest import encode_manifest
from tests.data_tools.corpora import write_corpus
from tests.hostile.attempt import Attempt
from tests.hostile.commands import Outcome, data_tool, tool
from tests.hostile.mutations import (
    change_of,
    damaged_bytes,
    leaves,
    replaced,
)
from tests.hostile.settings import DeepSpeedFile, RunFile
from tests.models.checkpoints import config, write_checkpoint


class CorpusFiles:
    """PREFIX.bin, .idx and .json of a corpus: any change of the first two must be found."""

    def __init__(self, folder: Path) -> None:
        self.prefix = folder / "corpus"
        generator = np.random.default_rng(0)
        rows = [generator.integers(300, size=n) for n in generator.integers(1, 40, size=50)]
        write_corpus(self.prefix, rows, vocab_size=300)
        self.files = {s: self.prefix.with_suffix(s).read_bytes() for s in (".bin", ".idx", ".json")}

    def attempt(self, draw: random.Random) -> Attempt:
        for suffix, data in self.files.items():
            self.prefix.with_suffix(suffix).write_bytes(data)
        suffix = draw.choice(list(self.files))
        path = self.prefix.with_suffix(suffix)
        spoilt, how = damaged_bytes(self.files[suffix], draw)
        path.write_bytes(spoilt)
        refuse = spoilt != self.files[suffix]
        if suffix == ".json" and draw.random() < 0.5:
            how, refuse = self._spoil_sidecar(path, draw)
        names = tuple(str(self.prefix.with_suffix(each)) for each in self.files)
        return Attempt(
            f"{suffix} {how}", lambda: data_tool("verify", str(self.prefix)), refuse, names
        )

    def _spoil_sidecar(self, path: Path, draw: random.Random) -> tuple[str, bool]:
        values = json.loads(self.files[".json"])
        key = draw.choice(
            ("num_tokens", "num_documents", "dtype", "max_token_id", "bin_sha256", "idx_sha256")
        )
        value = draw.choice((7, "x", None, [], {}, -1, 1e300))
        path.write_text(json.dumps(values | {key: value}))
        return f"{key}={value!r}", True


class RawText:
    """Files of text: a bad document must be refused, damage of the file is never a crash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def attempt(self, draw: random.Random) -> Attempt:
        lines = [json.dumps({"text": f"document {i} \u00e9"}).encode() for i in range(20)]
        bad, refuse = draw.choice(_BAD_LINES)
        place = draw.randrange(len(lines))
        data = b"\n".join([*lines[:place], bad, *lines[place:]])
        packing = draw.choice(("", ".gz", ".zst"))
        packed = _packed(data, packing)
        what = f"{packing} {bad[:40]!r} in line {place + 1}"
        if draw.random() < 0.4:
            packed, how = damaged_bytes(_packed(b"\n".join(lines), packing), draw)
            what, refuse = f"{packing} {how}", packing != "" and how.startswith("cut")
        path = self.folder / f"in.jsonl{packing}"
        path.write_bytes(packed)
        output = self.folder / "out"
        arguments = ("--input", str(path), "--output", str(output), "--tokenizer", "bytes")

        def run() -> Outcome:
            for old in self.folder.glob("out*"):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            outcome = data_tool("preprocess", *arguments, "--workers", "1")
            if outcome.code != 0 and (left := list(self.folder.glob("out.[bij]*"))):
                return outcome._replace(crash=f"left behind {left}")
            return outcome

        return Attempt(what, run, refuse, (str(path),), lambda outcome: None)


_BAD_LINES: tuple[tuple[bytes, bool], ...] = (
    (b'{"text": "\xff\xfe"}', True),
    (b'{"txet": "x"}', True),
    (b'{"text": 5}', True),
    (b'{"text": null}', True),
    (b'{"text": ["x"]}', True),
    (b'{"text": "\\ud800"}', True),
    (b'{"text": "cut', True),
    (b'["text"]', True),
    (b'"text"', True),
    (b"{" * 5000, True),
    (b'{"text": ' + b"[" * 100_000, True),
    (b'{"n": ' + b"9" * 1_000_000 + b', "text": "x"}', True),
    (b"\x00", True),
    (b"text", True),
    (b'{"text": "x"} {"text": "y"}', True),
    (b'\xef\xbb\xbf{"text": "x"}', True),
    (b"", False),
    (b"\r", False),
    (b'{"text": ""}', False),
    (b'{"text": "\\u0000\\u2028"}', False),
)


def _packed(data: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(data, mtime=0)
    return zstandard.compress(data) if packing == ".zst" else data


class TokenizerFile:
    """A tokenizer.json, which a library in Rust reads."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "tokenizer.json"
        # Not trained: where merges are equally frequent, training takes another one each time.
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "wo", "or", "wor", "ds", "words"]
        merges = [("w", "o"), ("o", "r"), ("wo", "r"), ("d", "s"), ("wor", "ds")]
        vocab = {token: number for number, token in enumerate(["<|endoftext|>", *tokens])}
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.save(str(self.file))
        self.valid = self.file.read_bytes()
        (folder / "in.txt").write_text("a few words")

    def attempt(self, draw: random.Random) -> Attempt:
        refuse = True
        if draw.random() < 0.5:
            spoilt, what = damaged_bytes(self.valid, draw)
            refuse = what.startswith("cut") and bool(self.valid[len(spoilt) :].strip())
            self.file.write_bytes(spoilt)
        else:
            values = json.loads(self.valid)
            path, value = draw.choice(
                [(path, value) for path, value in leaves(values) if path[:2] != ("model", "vocab")]
                + [(("model", "vocab", "w"), 5)] * 4
            )
            change = change_of(value, path, draw)
            what, refuse = f"{change.key}={change.value!r}", False
            self.file.write_text(json.dumps(replaced(values, path, change.value)))
        arguments = ("--input", str(self.folder / "in.txt"), "--output", str(self.folder / "out"))

        def run() -> Outcome:
            load_once.cache_clear()  # a process of its own would not have the last one
            options = ("--tokenizer", str(self.file), "--workers", "1", "--overwrite")
            return data_tool("preprocess", *arguments, *options)

        return Attempt(what, run, refuse, (str(self.file), str(self.folder / "in.txt")))


class CheckpointManifest:
    """manifest.json of a checkpoint, as every command that opens one reads it."""

    def __init__(self, folder: Path) -> None:
        self.step = folder / "step_0"
        write_checkpoint(self.step, config(), tensor=2)
        self.file = self.step / "manifest.json"
        self.valid = self.file.read_bytes()
        self.output = folder / "exported"

    def attempt(self, draw: random.Random) -> Attempt:
        spoilt, what = damaged_bytes(self.valid, draw)
        if draw.random() < 0.5:
            values = json.loads(self.valid)
            path, value = draw.choice(list(leaves(values)))
            change = change_of(value, path, draw)
            spoilt = (json.dumps(replaced(values, path, change.value), indent=1) + "\n").encode()
            what = f"{change.key}={change.value!r}"
        self.file.write_bytes(spoilt)
        run = draw.choice((self._verify, self._export))
        return Attempt(what, run, spoilt != self.valid, (str(self.file), str(self.step)))

    def _verify(self) -> Outcome:
        outcome = tool("pretrain.checkpoint", "verify", str(self.step))
        # Its verdict on damage is its output, and has an exit code of its own.
        if outcome.code == 3 and outcome.out.startswith(f"{self.step.name}: DAMAGED "):
            return Outcome(2, "", f"error: {outcome.out.strip()}\n")
        return outcome

    def _export(self) -> Outcome:
        shutil.rmtree(self.output, ignore_errors=True)
        arguments = ("--checkpoint", str(self.step), "--output", str(self.output))
        return tool("models.convert", "to-hf", *arguments, "--no-tokenizer")


class WeightsHeader:
    """The header of a weight file, under a manifest that vouches for the file."""

    def __init__(self, folder: Path) -> None:
        self.step = folder / "step_0"
        write_checkpoint(self.step, config(), tensor=2)
        self.file = self.step / "weights" / "pp_00_tp_01.safetensors"
        self.valid = self.file.read_bytes()
        self.output = folder / "exported"

    def attempt(self, draw: random.Random) -> Attempt:
        size = int.from_bytes(self.valid[:8], "little")
        header = json.loads(self.valid[8 : 8 + size])
        layout = json.loads(header["__metadata__"]["manyformer_layout"])
        if draw.random() < 0.5:
            name, place = draw.choice(list(layout["sharding"])), draw.randrange(2)
            value = draw.choice(("x", -1, 10**30, 0.5, [], {}, True, 7))
            layout["sharding"][name][place] = value
            what = f"sharding of {name}, {place}: {value!r}"
        else:
            key = draw.choice(("position", "sharding"))
            layout[key] = draw.choice(
                ([0, 10**9, 1, 10**9], [0, 1, 1], ["x"] * 4, [0, 1, 0.5, 2], 5, None, {}, [[], []])
            )
            what = f"{key}={layout[key]!r}"
        text = json.dumps(layout)
        if draw.random() < 0.1:
            text, what = "[" * 100_000, "nested"
        header["__metadata__"]["manyformer_layout"] = text
        data = json.dumps(header).encode()
        data = len(data).to_bytes(8, "little") + data + self.valid[8 + size :]
        self.file.write_bytes(data)
        vouch_for(self.step)
        return Attempt(what, self._export, True, ("pp_00_tp_01", "weight"))

    def _export(self) -> Outcome:
        shutil.rmtree(self.output, ignore_errors=True)
        arguments = ("--checkpoint", str(self.step), "--output", str(self.output))
        return tool("models.convert", "to-hf", *arguments, "--no-tokenizer")


def vouch_for(step: Path) -> None:
    """Forge a checkpoint's manifest, so that it fits whatever files are there now."""
    path = step / "manifest.json"
    content = json.loads(path.read_bytes())
    content.pop("checksum")
    for name in content["files"]:
        data = (step / name).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        content["files"][name] = {"size": len(data), "sha256": sha256, "rank": 0}
    path.write_bytes(encode_manifest(content))


class ForeignModel:
    """A Hugging Face directory: config.json, the index and the headers of safetensors files."""

    def __init__(self, folder: Path) -> None:
        write_checkpoint(folder / "step_0", config())
        self.model, self.output = folder / "model", folder / "imported"
        arguments = ("--checkpoint", str(folder / "step_0"), "--output", str(self.model))
        outcome = tool("models.convert", "to-hf", *arguments, "--max-shard-size", "60KB")
        assert outcome.code == 0, outcome
        paths = sorted(self.model.glob("*.json*")) + sorted(self.model.glob("*.safetensors"))
        self.files = {path.name: path.read_bytes() for path in paths}

    def attempt(self, draw: random.Random) -> Attempt:
        for name, data in self.files.items():
            (self.model / name).write_bytes(data)
        shards = [name for name in self.files if name.endswith(".safetensors")]
        name = draw.choice(["config.json", "model.safetensors.index.json", draw.choice(shards)])
        data = self.files[name]
        if name in shards:
            spoilt, what, refuse = _spoilt_header(data, draw)
        elif draw.random() < 0.4:
            spoilt, what = damaged_bytes(data, draw)
            refuse = what.startswith("cut") and bool(data[len(spoilt) :].strip())
        elif draw.random() < 0.1:
            spoilt, what, refuse = b'{"a":' * 100_000, "nested", True
        else:
            values = json.loads(data)
            path, value = draw.choice(list(leaves(values)))
            change = change_of(value, path, draw)
            spoilt = json.dumps(replaced(values, path, change.value)).encode()
            what, refuse = f"{change.key}={change.value!r}", path[0] == "weight_map"
        (self.model / name).write_bytes(spoilt)
        return Attempt(f"{name} {what}", self._import, refuse, (str(self.model), "sizes"))

    def _import(self) -> Outcome:
        shutil.rmtree(self.output, ignore_errors=True)
        arguments = ("--model", str(self.model), "--output", str(self.output))
        outcome = tool("models.convert", "from-hf", *arguments)
        if outcome.code != 0 and self.output.exists():
            return outcome._replace(crash="left its output behind")
        return outcome


def _spoilt_header(data: bytes, draw: random.Random) -> tuple[bytes, str, bool]:
    """The header of a safetensors file with a wrong length, place, shape, type or name."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    kind = draw.choice(("offsets", "shape", "dtype", "name", "length", "entry", "deep"))
    if kind == "length":
        wrong = draw.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:], f"{kind} {wrong}", True
    if kind == "deep":
        text = b"[" * 200_000
        return len(text).to_bytes(8, "little") + text + data[8 + size :], kind, True
    changes: dict[str, tuple[str, list[Any]]] = {
        "offsets": (
            "data_offsets",
            [[begin + 4, end + 4], [end, begin], [begin, end - 1], [-1, end], [0, 2**63], [0]],
        ),
        "shape": ("shape", [[-1], [2**62, 8], [], [0], ["x"], 5, [*entry["shape"], 2]]),
        "dtype": ("dtype", ["F64", "F31", 5, None, "BF16", "I32"]),
    }
    if kind in changes:
        key, values = changes[kind]
        value = draw.choice(values)
        header[name] = {**entry, key: value}
    else:
        value = draw.choice(([], None, {}, {"dtype": "F32"}))
        header[name if kind == "entry" else f"{name}x"] = value if kind == "entry" else entry
        if kind == "name":
            del header[name]
    text = json.dumps(header).encode()
    spoilt = len(text).to_bytes(8, "little") + text + data[8 + size :]
    return spoilt, f"{kind} of {name}: {header.get(name)}", True


SURFACES: dict[str, type[Any]] = {
    "run file and overrides": RunFile,
    "DeepSpeed JSON": DeepSpeedFile,
    "corpus": CorpusFiles,
    "text": RawText,
    "tokenizer": TokenizerFile,
    "checkpoint manifest": CheckpointManifest,
    "weight file": WeightsHeader,
    "Hugging Face model": ForeignModel,
}
