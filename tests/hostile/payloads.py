"""Files that run a command where they are unpickled, built, imported or handed to a shell."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Call:
    """Pickled, it is a call that unpickling makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def payloads(canary: Path) -> dict[str, bytes]:
    """Twenty-two of them; whichever of them is run leaves a file `canary`."""
    import os
    import subprocess

    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    shell = _Call(os.system, command)
    pickled = pickle.dumps(shell, protocol=2)
    return {
        "pickle of os.system": pickled,
        "pickle of protocol 0": pickle.dumps(shell, protocol=0),
        "pickle of protocol 5": pickle.dumps({"weights": [shell]}, protocol=5),
        "pickle of eval": pickle.dumps(_Call(eval, code)),
        "pickle of exec": pickle.dumps(_Call(exec, code)),
        "pickle of Popen": pickle.dumps(_Call(subprocess.Popen, ["touch", str(canary)])),
        "pickle of getattr": _attribute_chain(command),
        "torch zip": _torch(shell, zipped=True),
        "torch zip of a state": _torch({"w": torch.zeros(2), "x": shell}, zipped=True),
        "torch legacy": _torch(shell, zipped=False),
        "torch tar": _tar({"pickle": pickled, "storages": pickled, "tensors": pickled}),
        "zip in a zip": _zip({"archive/data.pkl": _zip({"archive/data.pkl": pickled})}),
        "TorchScript": _torch_script(pickled),
        "huge storage": _huge_storage(pickled),
        "numpy objects": _numpy(np.array([shell], dtype=object)),
        "numpy archive": _zip({"arr_0.npy": _numpy(np.array([shell], dtype=object))}),
        "gzip of a pickle": gzip.compress(pickled),
        "YAML object": f"!!python/object/apply:os.system ['{command}']\n".encode(),
        "YAML new": f"x: !!python/object/new:os.system [{command}]\n".encode(),
        "JSON object": json.dumps(
            {"py/reduce": [{"py/function": "os.system"}, [command]], "__class__": "os.system"}
        ).encode(),
        "safetensors and pickle": _safetensors(pickled),
        "Python": f"#!/usr/bin/env python3\nimport os\nos.system({command!r})\n".encode(),
    }


def _attribute_chain(command: str) -> bytes:
    """`getattr(__import__('os'), 'system')(command)`, of names that look harmless one by one."""
    return (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'"
        + command.encode()
        + b"'\ntR."
    )


def _torch(value: Any, *, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _zip(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return file.getvalue()


def _tar(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def _torch_script(pickled: bytes) -> bytes:
    code = b"class M(Module):\n  def forward(self):\n    return 0\n"
    return _zip(
        {
            "archive/data.pkl": pickled,
            "archive/constants.pkl": pickled,
            "archive/code/__torch__.py": code,
            "archive/version": b"3",
        }
    )


def _huge_storage(pickled: bytes) -> bytes:
    """A pickle behind the claim of a tensor of 2**60 bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]}})
    return struct.pack("<Q", len(header)) + header.encode() + pickled


def _numpy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _safetensors(pickled: bytes) -> bytes:
    """Valid for who reads the beginning, a pickle for who finds it in the metadata or behind."""
    metadata = {"format": "pt", "state": base64.b64encode(pickled).decode()}
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": metadata, "w": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4) + _zip({"a/data.pkl": pickled})
