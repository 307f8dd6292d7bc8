"""Calls of CUDA code exist, with these arguments, in the pinned packages and in torch 2.11: nothing else here can run them.

tests/data/cuda_calls.json lists them. After a change of such a call or of a pinned version, write it again:
`python -m tests.support.outside_calls WHEEL` with a wheel of torch 2.11 for any platform (`pip download --no-deps torch==2.11.0`).
"""

import json
import re
import sysconfig
from pathlib import Path

import pytest

from tests.support.outside_calls import LIST, Definition, OutsideCall, Package, describe, listed

BITSANDBYTES = Path(sysconfig.get_paths()["purelib"]) / "bitsandbytes"


def test_list_of_cuda_calls_is_current():
    known = json.loads(LIST.read_text("utf-8"))
    in_torch_2_11 = {entry["call"]: entry["in torch 2.11"] for entry in known if "in torch 2.11" in entry}
    assert known == listed(in_torch_2_11), "write it again, see the docstring of this file"


def test_every_cuda_call_exists_with_its_arguments():
    places = [
        place
        for entry in json.loads(LIST.read_text("utf-8"))
        for place in (entry["defined at"], entry.get("in torch 2.11", "x.py:1"))
    ]
    assert [place for place in places if not re.fullmatch(r"[\w/]+\.pyi?:\d+", place)] == []
    assert len(places) > 50


class Files:
    """Source files of a package that this test writes."""

    _TEXTS = {
        "pack/__init__.py": "from .parts import *\nfrom pack.parts import inner as renamed\n",
        "pack/parts.py": "def inner(a, *, b=1): ...\nclass Base:\n    size: int\n    def grow(self, by): ...\nclass Thing(Base):\n"
        "    def __init__(self, a): ...\n",
    }

    def read(self, path: str) -> str | None:
        return self._TEXTS.get(path)


@pytest.mark.parametrize(
    ("name", "positional", "keywords", "found"),
    [
        ("pack.renamed", 1, ("b",), "pack/parts.py:1"),
        ("pack.inner", 1, ("c",), "does not accept"),
        ("pack.inner", 2, (), "does not accept"),
        ("pack.Thing", 1, (), "pack/parts.py:5"),
        ("pack.Thing", 2, (), "does not accept"),
        ("pack.Thing.grow", 1, (), "pack/parts.py:4"),
        ("pack.Thing.size", None, (), "pack/parts.py:3"),
        ("pack.Thing.shrink", 1, (), "missing"),
        ("pack.other", None, (), "missing"),
    ],
)
def test_calls_are_compared_with_definitions(
    name: str, positional: int | None, keywords: tuple[str, ...], found: str
):
    assert found in describe(Package(Files()), OutsideCall(name, "ours.py", positional, keywords))


def test_pinned_definition_has_parameters():
    definition = Package(Files()).find("pack.inner")
    assert isinstance(definition, Definition)
    assert str(definition.parameters) == "(a, *, b=Ellipsis)"


@pytest.mark.parametrize("cuda", ["130", "132"])
def test_bitsandbytes_has_its_functions_for_cuda_13(cuda: str):
    sources = (BITSANDBYTES / name for name in ("functional.py", "backends/cuda/ops.py"))
    functions = {
        name for source in sources for name in re.findall(r"\blib\.(c\w+)", source.read_text("utf-8"))
    }
    assert {"cadam_8bit_blockwise_grad_bf16", "cquantize_blockwise_bf16_nf4", "cget_managed_ptr"} <= functions
    library = (BITSANDBYTES / f"libbitsandbytes_cuda{cuda}.so").read_bytes()
    assert [name for name in sorted(functions) if b"\0" + name.encode() + b"\0" not in library] == []
