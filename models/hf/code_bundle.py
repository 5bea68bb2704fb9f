"""Modeling files for transformers, generated from the modules that the project itself runs.

A model that transformers does not have travels with its code: its directory holds Python files that
`from_pretrained(directory, trust_remote_code=True)` imports. They are not a second implementation:
`bundle` follows the imports of a module within the project and writes the source of all that
it needs, comments included, into one file.
"""

from __future__ import annotations

import ast
import builtins
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from models.hf.code_source import (
    LINE_LENGTH,
    PROJECT,
    REQUIREMENTS,
    Module,
    Origin,
    Statement,
    may_import,
    read_module,
)

_ROOT = Path(__file__).parents[2]

Modules = dict[str, Module]


class CodeFile(NamedTuple):
    """The source of a generated file: a module of the project, or the `text` of one."""

    module: str
    text: str | None = None


def code_of(model_type: str, config_module: str) -> dict[str, CodeFile]:
    """The files of a family that has modules for them: `models.<package>.hf.config...` with the
    configuration, and beside it `modeling...`."""
    modeling = config_module.replace(".hf.config", ".hf.modeling")
    return {
        f"configuration_{model_type}.py": CodeFile(config_module),
        f"modeling_{model_type}.py": CodeFile(modeling),
    }


def bundle(files: Mapping[str, CodeFile], *, root: Path = _ROOT) -> dict[str, str]:
    """Generate the text of each file, by its name.

    A file gets the definitions of its module and of what that needs; later files import from it.
    Definitions that no file needs are left out.

    Raises:
        ValueError: the modules cannot share one namespace, or need what they may not import.
    """
    modules: Modules = {}
    owners: dict[str, str] = {}  # module -> file
    texts = {entry.module: entry.text for entry in files.values() if entry.text is not None}
    for file, entry in files.items():
        _collect(entry.module, modules, root, texts)
        owners |= {name: file for name in modules if name not in owners}
    needed = _reachable((entry.module for entry in files.values()), modules)
    return {file: _render(file, entry, modules, owners, needed) for file, entry in files.items()}


def write_files(files: Mapping[str, CodeFile], directory: Path) -> None:
    """Write the text of each file into a directory.

    Raises:
        ValueError: as `bundle`.
    """
    for name, text in bundle(files).items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _collect(name: str, modules: Modules, root: Path, texts: Mapping[str, str]) -> None:
    """Read a module, after those that it imports."""
    if name in modules:
        return
    module = read_module(name, root, text=texts.get(name))
    for origin in module.scope.values():
        if origin.is_project and origin.module != name:
            _collect(origin.module, modules, root, texts)
    modules[name] = module


# Reachability.


def _reachable(entries: Iterable[str], modules: Modules) -> set[Origin]:
    """The definitions of the entry modules and everything that they need."""
    todo = [Origin(e, name) for e in entries for s in modules[e].statements for name in s.names]
    needed: set[Origin] = set()
    while todo:
        origin = todo.pop()
        if origin in needed:
            continue
        needed.add(origin)
        if origin.is_project and origin.name:
            module = modules[origin.module]
            for statement in module.statements:
                if origin.name in statement.names:
                    todo += _references(statement, module, modules).values()
                    todo += [m.origin for m in _members(statement, module, modules)]
    return needed


def _references(statement: Statement, module: Module, modules: Modules) -> dict[str, Origin]:
    """Global names in a statement, and their origins.

    A local name that is also a global one counts as global: more may be kept than is needed.
    """
    names = {node.id for node in ast.walk(statement.node) if isinstance(node, ast.Name)}
    return {n: _resolved(module.scope[n], modules) for n in sorted(names & set(module.scope))}


class Member(NamedTuple):
    """`name` in a module imported as a whole, as in `noise.normal`, and its origin."""

    module: str
    name: str
    origin: Origin


def _members(statement: Statement, module: Module, modules: Modules) -> Iterator[Member]:
    for node in ast.walk(statement.node):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            whole = module.scope.get(node.value.id, Origin(""))
            if whole.is_project and not whole.name and node.attr in modules[whole.module].scope:
                origin = _resolved(Origin(whole.module, node.attr), modules)
                yield Member(whole.module, node.attr, origin)


def _resolved(origin: Origin, modules: Modules) -> Origin:
    """Follow a name through modules that only import it."""
    while origin.is_project and origin.name:
        scope = modules[origin.module].scope
        if origin.name not in scope:
            raise ValueError(
                f"{origin.module} does not define {origin.name}; import the name from where it is "
                "defined"
            )
        if scope[origin.name] == origin:
            break
        origin = scope[origin.name]
    return origin


# Writing files.


def _render(
    file: str, entry: CodeFile, modules: Modules, owners: Mapping[str, str], needed: set[Origin]
) -> str:
    own = [m for m in modules.values() if owners[m.name] == file and m.kept(needed)]
    used: dict[str, Origin] = {}
    sections = []
    for module in own:
        kept = module.kept(needed)
        for statement in kept:
            own_names = {name: Origin(module.name, name) for name in statement.names}
            _bind(used, own_names | _references(statement, module, modules), file)
        section = _section(module, kept, titled=module.name != entry.module)
        if Origin(module.name) in needed:
            _bind(used, {"SimpleNamespace": Origin("types", "SimpleNamespace")}, file)
            section += _namespace(module.name, modules, needed)
        sections.append(section)
    package = entry.module.rpartition(".")[0]
    source = entry.module if entry.text is None else f"the declaration of {package}"
    head = "\n".join(
        (
            "# SPDX-License-Identifier: Apache-2.0",
            f"# Generated by {PROJECT} {_version()} from {source} and what it imports.",
            f'"""{modules[entry.module].docstring}"""',
        )
    )
    imports = _import_groups(used, owners, file)
    top = "\n\n".join((head, "from __future__ import annotations", *imports))
    return "\n\n\n".join((top, *sections)) + "\n"


def _bind(used: dict[str, Origin], names: Mapping[str, Origin], file: str) -> None:
    """Bind the global names of a file to their origins.

    Raises:
        ValueError: a name has two origins, hides a builtin, or is of another package.
    """
    for name, origin in names.items():
        if used.setdefault(name, origin) != origin:
            both = " and ".join(".".join(filter(None, o)) for o in (used[name], origin))
            raise ValueError(f"{file}: {name} stands for {both}; rename one of them")
        if origin.is_project and hasattr(builtins, name):
            raise ValueError(f"{file}: {name} of {origin.module} hides a builtin; rename it")
        if not origin.is_project and not may_import(origin.module):
            raise ValueError(
                f"{file} would import {origin.module}, which is none of {', '.join(REQUIREMENTS)}; "
                "import it inside a function that the file does not need"
            )


def _section(module: Module, statements: list[Statement], *, titled: bool) -> str:
    parts = []
    if titled:
        rule = "# " + "-" * (LINE_LENGTH - 2)
        title = f"{module.name}\n\n{module.docstring}".strip().splitlines()
        parts.append("\n".join((rule, *(f"# {line}".rstrip() for line in title), rule)))
    for before, statement in zip((None, *statements), statements, strict=False):
        if not any(s and _is_large(s) for s in (before, statement)):
            parts.append("\n" * (1 + (statement.is_apart or before is None)))
        else:
            parts.append("\n\n\n")
        parts.append(statement.text)
    return "".join(parts).lstrip("\n")


def _is_large(statement: Statement) -> bool:
    return isinstance(statement.node, ast.FunctionDef | ast.ClassDef)


def _namespace(name: str, modules: Modules, needed: set[Origin]) -> str:
    """A module as an object, for code that imports it as a whole."""
    members = {
        f"    {member.name}={member.origin.name},\n"
        for module in modules.values()
        for statement in module.kept(needed)
        for member in _members(statement, module, modules)
        if member.module == name
    }
    return f"\n\n\n{name.split('.')[-1]} = SimpleNamespace(\n{''.join(sorted(members))})"


def _import_groups(used: Mapping[str, Origin], owners: Mapping[str, str], file: str) -> list[str]:
    """Imports of other packages, standard library first, and of names that other files have."""
    groups: dict[str, list[str]] = {"stdlib": [], "foreign": [], "relative": []}
    members: dict[str, list[str]] = {}
    for name, origin in sorted(used.items()):
        if origin.is_project and owners[origin.module] != file:
            members.setdefault("." + owners[origin.module].removesuffix(".py"), []).append(name)
        elif not origin.is_project and origin.name:
            alias = name if name == origin.name else f"{origin.name} as {name}"
            members.setdefault(origin.module, []).append(alias)
        elif not origin.is_project:
            plain = origin.module.split(".")[0] == name
            line = f"import {origin.module}" + ("" if plain else f" as {name}")
            groups[_group(origin.module)].append(line)
    for lines in groups.values():
        lines.sort()
    for module, names in sorted(members.items()):
        groups[_group(module)].append(_from_import(module, names))
    return ["\n".join(lines) for lines in groups.values() if lines]


def _group(module: str) -> str:
    if module.startswith("."):
        return "relative"
    return "stdlib" if module.split(".")[0] in sys.stdlib_module_names else "foreign"


def _from_import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join((f"from {module} import (", *(f"    {name}," for name in names), ")"))


def _version() -> str:
    try:
        return importlib.metadata.version(PROJECT)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
