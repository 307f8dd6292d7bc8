"""The import graph: import-linter's contracts, and limits that they do not state."""

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

from tests.support.jobs import PROJECT

RAY_INTERNALS = "training.loop.ray_internals"
MAX_LEVELS = 12
"""Modules on the longest import chain in training/, which a reader has to know to understand the top one."""


def test_import_contracts_are_kept():
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(settings['contracts'])} kept, 0 broken." in done.stdout


def test_training_has_at_most_12_import_levels():
    graph = grimp.build_graph("training")

    @cache
    def level(module: str) -> int:
        imported = graph.find_modules_directly_imported_by(module)
        return 1 + max((level(name) for name in imported), default=0)

    levels = {module: level(module) for module in graph.modules}
    assert max(levels.values()) <= MAX_LEVELS, sorted(levels.items(), key=lambda item: -item[1])[:5]


def is_private(name: str) -> bool:
    """Return whether a dotted name is one of Ray's private names; the autoscaler's Python modules are not documented."""
    first, *parts = name.split(".")
    return first == "ray" and (
        parts[:1] == ["autoscaler"] or any(part.startswith("_") and not part.endswith("__") for part in parts)
    )


def ray_names(source: str) -> Iterator[str]:
    """Yield the dotted names that a module imports from Ray or reads from names imported from it."""
    tree = ast.parse(source)
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                first = alias.name.partition(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in bound:
            yield ".".join([bound[inner.id], *parts])


def private_ray_names(source: str) -> set[str]:
    return {name for name in ray_names(source) if is_private(name)}


@pytest.mark.parametrize(
    "source",
    [
        "import ray._private",
        "import ray._private.state as state",
        "from ray import _private",
        "from ray.train import _internal as internal",
        "from ray.train.v2._internal.constants import NAME",
        "from ray._raylet import GcsClient",
        "from ray.autoscaler import sdk",
        "import ray\n\ndef f():\n    return ray._private.worker",
        "import ray.train as train\ntrain.v2._internal.constants",
        "from ray.train import torch as t\nt._backend()",
    ],
)
def test_private_ray_names_are_found(source: str):
    assert private_ray_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "import ray\nray.__version__",
        "from ray.train import ScalingConfig as _Config",
        "from training.loop import _ray",
        "import torch\ntorch._C",
    ],
)
def test_other_names_are_not_private_ray_names(source: str):
    assert not private_ray_names(source)


def product_files() -> list[Path]:
    packages = ("service", "training", "runs", "configs", "utils")
    return [
        PROJECT / "main.py",
        *(file for package in packages for file in (PROJECT / package).rglob("*.py")),
    ]


def test_ray_private_names_are_imported_in_one_file():
    found = [
        str(file.relative_to(PROJECT))
        for file in product_files()
        if private_ray_names(file.read_text("utf-8"))
    ]
    assert found == ["training/loop/ray_internals.py"]


def extends_ray(source: str) -> bool:
    """Return whether a module has a class whose base it imports from Ray or from ray_internals."""
    tree = ast.parse(source)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("ray.", RAY_INTERNALS))
        for alias in node.names
    }
    return any(
        isinstance(base, ast.Name) and base.id in imported
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    )


def overridden_private_methods(extended: type) -> set[str]:
    """Return the private methods of Ray's classes that a class overrides itself."""
    of_ray = {name for base in extended.__mro__ if base.__module__.startswith("ray.") for name in vars(base)}
    own = {name for name in vars(extended) if name.startswith("_") and not name.endswith("__")}
    return (own & of_ray) - {"_abc_impl"}  # every abstract class has this one


@pytest.mark.slow
def test_ray_private_methods_are_overridden_in_one_file():
    names = {
        ".".join(file.relative_to(PROJECT).with_suffix("").parts)
        for file in product_files()
        if extends_ray(file.read_text("utf-8"))
    }
    found: dict[str, set[str]] = {}
    for module in map(importlib.import_module, names):
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                found.setdefault(module.__name__, set()).update(overridden_private_methods(value))
    assert [name for name, methods in found.items() if methods] == [RAY_INTERNALS]
    assert {"training.launch.elastic", "training.launch.trainer"} <= found.keys()
