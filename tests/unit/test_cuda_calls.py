"""Calls of CUDA code exist, with these arguments, in the pinned packages and in torch 2.11: nothing else here can run them.

tests/data/cuda_calls.json lists them. After a change of such a call or of a pinned version, write it again:
`python -m tests.support.outside_calls WHEEL` with a wheel of torch 2.11 for any platform (`pip download --no-deps torch==2.11.0`).
"""

import json
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import PROJECT
from tests.support.outside_calls import (
    LIST,
    SOURCES,
    Definition,
    OutsideCall,
    Package,
    calls_of,
    describe,
    listed,
)

BITSANDBYTES = Path(sysconfig.get_paths()["purelib"]) / "bitsandbytes"


def test_list_of_cuda_calls_is_current():
    known = json.loads(LIST.read_text("utf-8"))
    in_torch_2_11 = {entry["call"]: entry["in torch 2.11"] for entry in known if "in torch 2.11" in entry}
    current = listed(in_torch_2_11)
    assert known == current, changes(known, current)


def changes(known: list[dict[str, Any]], current: list[dict[str, Any]]) -> str:
    """Return the calls that were added, removed or changed, and the command that writes the list."""
    before, after = ({entry["call"]: entry for entry in entries} for entries in (known, current))
    lines = [f"added: {call} in {', '.join(after[call]['files'])}" for call in after if call not in before]
    lines += [
        f"removed: {call} of {', '.join(before[call]['files'])}" for call in before if call not in after
    ]
    lines += [
        f"changed: {before[call]} -> {after[call]}"
        for call in before
        if call in after and before[call] != after[call]
    ]
    command = ".venv/bin/python -m tests.support.outside_calls WHEEL_OF_TORCH_2_11"
    return "\n".join([*lines, f"write the list again: {command}"])


def test_failure_names_the_changes_and_the_command():
    known = [{"call": "a()", "files": ["x.py"]}, {"call": "b()", "files": ["x.py"]}]
    text = changes(known, [{"call": "b()", "files": ["x.py", "y.py"]}, {"call": "c()", "files": ["y.py"]}])
    assert "added: c() in y.py" in text
    assert "removed: a() of x.py" in text
    assert "changed: {'call': 'b()'" in text
    assert "tests.support.outside_calls" in text


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
        ("pack.inner", 0, ("b",), "does not accept"),
        ("pack.Thing.grow", 0, (), "does not accept"),
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


def test_unpacked_mapping_may_have_the_required_argument():
    call = OutsideCall("pack.inner", "ours.py", 0, ("b",), unpacks_keywords=True)
    assert describe(Package(Files()), call) == "pack/parts.py:1"
    assert call.text == "pack.inner(b=, **)"


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("tensor.cuda(0, non_blocking=True)", "torch.Tensor.cuda(_, non_blocking=)"),
        ("self.model.cuda()", "torch.Tensor.cuda()"),
        ("torch.cuda.set_device(0)", "torch.cuda.set_device(_)"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.allow_tf32"),
        ("torch.backends.cudnn.benchmark = True", "torch.backends.cudnn.benchmark"),
        ("torch.compile(model, **options)", "torch.compile(_, **)"),
        (
            "from transformers.integrations.deepspeed import deepspeed_config as config; config()",
            "transformers.integrations.deepspeed.deepspeed_config()",
        ),
        (
            "def convert(engine: 'DeepSpeedEngine'): engine.load_checkpoint(path)",
            "deepspeed.DeepSpeedEngine.load_checkpoint(_)",
        ),
        ("engine: DeepSpeedEngine = made\nengine.step()", "deepspeed.DeepSpeedEngine.step()"),
    ],
)
def test_cuda_calls_of_a_line_are_found(line: str, call: str):
    text = f"import torch\nfrom deepspeed import DeepSpeedEngine\n{line}\n"
    assert call in {found.text for found in calls_of("ours.py", text)}


def test_calls_of_every_directory_with_code_are_listed():
    directories = {
        path.name
        for path in PROJECT.iterdir()
        if path.is_dir() and path.name[0] != "." and any(path.rglob("*.py"))
    }
    assert directories - {"tests"} <= set(SOURCES)


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
