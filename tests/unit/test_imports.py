"""Limits of the import graph that import-linter's contracts do not state."""

import re
from functools import cache

import grimp

from tests.support.jobs import PROJECT

MAX_LEVELS = 12
"""Modules on the longest import chain in training/, which a reader has to know to understand the top one."""


def test_training_has_at_most_12_import_levels():
    graph = grimp.build_graph("training")

    @cache
    def level(module: str) -> int:
        imported = graph.find_modules_directly_imported_by(module)
        return 1 + max((level(name) for name in imported), default=0)

    levels = {module: level(module) for module in graph.modules}
    assert max(levels.values()) <= MAX_LEVELS, sorted(levels.items(), key=lambda item: -item[1])[:5]


def test_ray_private_names_are_imported_in_one_file():
    private = re.compile(r"^\s*(from|import) ray\.(_private|_raylet|autoscaler|train\.v2\._internal)\b", re.M)
    rooms = ("training", "runs", "configs", "utils")
    files = [file for room in rooms for file in (PROJECT / room).rglob("*.py")]
    found = [str(file.relative_to(PROJECT)) for file in files if private.search(file.read_text("utf-8"))]
    assert found == ["training/loop/ray_internals.py"]
