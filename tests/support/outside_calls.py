"""Calls of CUDA code in our source, with the source lines that define them: `python -m tests.support.outside_calls TORCH_2_11_WHEEL`.

CUDA code cannot run here, so a call is checked against the source that it will meet: the name exists, and its parameters accept the
call's arguments. The packages are read, not imported. The command writes tests/data/cuda_calls.json with the lines in the pinned
packages and, from a wheel of torch 2.11 for any platform, in the oldest torch that the GPU benchmark runs with.
"""

import ast
import json
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Protocol

from tests.support.jobs import PROJECT

LIST = PROJECT / "tests" / "data" / "cuda_calls.json"
SOURCES = ("main.py", "benchmarks", "configs", "cookbooks", "runs", "service", "training", "utils")
WATCHED = (
    "torch._C",
    "torch.Tensor.cuda",
    "torch.accelerator",
    "torch.backends.cuda",
    "torch.backends.cudnn",
    "torch.compile",
    "torch.cuda",
    "torch.distributed",
    "torch.nn.attention",
    "torch.random",
    "torch.serialization.add_safe_globals",
    "torch.use_deterministic_algorithms",
    "torch.get_autocast_dtype",
    "torch.is_autocast_enabled",
    "bitsandbytes",
    "deepspeed",
    "flash_attn",
    "liger_kernel",
    "transformers.integrations.deepspeed",
    "unsloth.",
)
"""Beginnings of the names that are listed."""

# Variables whose class no annotation states: (our file, variable) -> class.
_CLASSES = {
    ("training/checkpoints/resharding.py", "engine"): "deepspeed.DeepSpeedEngine",
    ("training/loop/trainers.py", "engine"): "deepspeed.DeepSpeedEngine",
    ("training/planning/devices.py", "found"): "torch._C._CudaDeviceProperties",
    ("training/loop/trainers.py", "unwrapped"): "bitsandbytes.optim.optimizer.Optimizer8bit",
}
# Names that a package assigns when it is imported.
_ALIASES = {"unsloth.FastLanguageModel": "unsloth.models.loader.FastLanguageModel"}


@dataclass(frozen=True)
class OutsideCall:
    """A call, or another use, of a name of another package."""

    name: str
    """Dotted name, as our imports spell it."""
    file: str
    positional: int | None
    """Number of positional arguments; None if it is not called or unpacks a sequence."""
    keywords: tuple[str, ...]
    unpacks_keywords: bool = False
    """True if it unpacks a mapping, which may have any further argument."""

    @property
    def text(self) -> str:
        """The call as source text, with a placeholder for each positional argument."""
        if self.positional is None:
            return self.name
        arguments = ["_"] * self.positional + [f"{keyword}=" for keyword in self.keywords]
        arguments += ["**"] * self.unpacks_keywords
        return f"{self.name}({', '.join(arguments)})"


class Sources(Protocol):
    """The source files of packages."""

    def read(self, path: str) -> str | None:
        """Return the text of a file by its path below site-packages, or None."""
        ...


class Installed:
    """The packages of this environment."""

    def read(self, path: str) -> str | None:
        """Return the text of an installed file."""
        file = Path(sysconfig.get_paths()["purelib"]) / path
        return file.read_text("utf-8") if file.is_file() else None


class Wheel:
    """The files in a wheel."""

    def __init__(self, path: Path):
        self._archive = zipfile.ZipFile(path)
        self._names = set(self._archive.namelist())

    def read(self, path: str) -> str | None:
        """Return the text of a file in the wheel."""
        return self._archive.read(path).decode() if path in self._names else None


@dataclass(frozen=True)
class Definition:
    """The line that defines a name, and its parameters."""

    path: str
    line: int
    parameters: Signature | None
    """None for a name that is not called, such as a variable."""


@dataclass
class Package:
    """Finder of definitions in source files."""

    sources: Sources
    _trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def find(self, name: str) -> Definition | None:
        """Return the definition of a dotted name, following imports; None if it has none."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            path = self._module(parts[:length])
            if path and length < len(parts):
                return self._in_module(path, parts[:length], parts[length:], frozenset())
            if path:
                return Definition(path, 1, None)
        return None

    def _module(self, parts: list[str]) -> str | None:
        base = "/".join(parts)
        paths = (f"{base}{ending}" for ending in ("/__init__.py", ".py", "/__init__.pyi", ".pyi"))
        return next((path for path in paths if self._tree(path)), None)

    def _tree(self, path: str) -> ast.Module | None:
        if path not in self._trees:
            text = self.sources.read(path)
            self._trees[path] = None if text is None else ast.parse(text)
        return self._trees[path]

    def _in_module(
        self, path: str, module: list[str], names: list[str], seen: frozenset[tuple[str, str]]
    ) -> Definition | None:
        """Return the definition of `names`, a name and its attributes, in a module."""
        if (path, names[0]) in seen:
            return None
        seen |= {(path, names[0])}
        tree = self._tree(path)
        assert tree
        stars = []
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                package = module if "/__init__.py" in path else module[:-1]
                origin = package[: len(package) - node.level + 1] if node.level else []
                origin = [*origin, *(node.module.split(".") if node.module else [])]
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(origin)
                    elif (alias.asname or alias.name) == names[0] and (
                        found := self._follow(origin, [alias.name, *names[1:]], seen)
                    ):
                        return found
            elif isinstance(node, ast.Import) and any((a.asname or a.name) == names[0] for a in node.names):
                return self.find(".".join(names))
            elif found := _defined(node, names):
                return Definition(path, found[0], found[1])
            elif isinstance(node, ast.ClassDef) and node.name == names[0] and names[1:]:
                bases = ([*ast.unparse(base).split("."), *names[1:]] for base in node.bases)
                return next(
                    (found for base in bases if (found := self._in_module(path, module, base, seen))), None
                )
        return next((found for origin in stars if (found := self._follow(origin, names, seen))), None)

    def _follow(
        self, module: list[str], names: list[str], seen: frozenset[tuple[str, str]]
    ) -> Definition | None:
        if self._module([*module, names[0]]):
            return self.find(".".join([*module, *names]))
        path = self._module(module)
        return self._in_module(path, module, names, seen) if path else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under conditions included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _statements(node.body)
            yield from _statements(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _defined(node: ast.stmt, names: list[str]) -> tuple[int, Signature | None] | None:
    """Return (line, parameters) if the statement defines `names`."""
    if isinstance(node, ast.FunctionDef) and node.name == names[0]:
        return node.lineno, _signature(node.args)
    if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
        constants = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
        return (node.lineno, None) if names[0] in constants else None
    if isinstance(node, ast.ClassDef) and node.name == names[0]:
        return _in_class(node, names[1:])
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
        return node.lineno, None
    return None


def _in_class(node: ast.ClassDef, names: list[str]) -> tuple[int, Signature | None] | None:
    """Return (line, parameters) of a class, or of its method or attribute."""
    methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
    if not names:
        method = methods.get("__init__") or methods.get("__new__")
        return node.lineno, _signature(method.args, drops_self=True) if method else None
    if method := methods.get(names[0]):
        is_static = any(getattr(name, "id", "") == "staticmethod" for name in method.decorator_list)
        return method.lineno, _signature(method.args, drops_self=not is_static)
    for part in ast.walk(node):
        if isinstance(part, ast.Assign | ast.AnnAssign):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            if any(ast.unparse(target) in (names[0], f"self.{names[0]}") for target in targets):
                return part.lineno, None
    return None


def _signature(arguments: ast.arguments, *, drops_self: bool = False) -> Signature:
    """Return the parameters of a function, with a placeholder for each default."""
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    kind = [Parameter.POSITIONAL_ONLY] * len(arguments.posonlyargs)
    kind += [Parameter.POSITIONAL_OR_KEYWORD] * len(arguments.args)
    parameters = [
        Parameter(argument.arg, kind[index], default=Parameter.empty if index < required else ...)
        for index, argument in enumerate(positional)
    ][drops_self:]
    if arguments.vararg:
        parameters.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(
            Parameter(
                argument.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else ...
            )
        )
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(parameters)


class _Finder(ast.NodeVisitor):
    """A visitor that collects the watched names of one of our files."""

    def __init__(self, file: str):
        self.file = file
        self.calls: set[OutsideCall] = set()
        self._imported: dict[str, str] = {}
        self._classes: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._imported[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self._imported[alias.asname or alias.name] = _ALIASES.get(name, name)
            self._add(_ALIASES.get(name, name), None)

    def visit_arg(self, node: ast.arg) -> None:
        if name := self._class_of(node.annotation):
            self._classes[node.arg] = name
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and (name := self._class_of(node.annotation)):
            self._classes[node.target.id] = name

    def _class_of(self, annotation: ast.expr | None) -> str | None:
        """Return the dotted name of an annotation, which may be quoted."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        return self._dotted(annotation) if annotation else None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        name = self._dotted(node.value.func) if isinstance(node.value, ast.Call) else None
        if name and name.rpartition(".")[2][0].isupper() and isinstance(node.targets[0], ast.Name):
            self._classes[node.targets[0].id] = name

    def visit_Call(self, node: ast.Call) -> None:
        if name := self._dotted(node.func):
            self._add(name, node)
            for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                self.visit(argument)
        else:
            if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":  # of a tensor or module
                self._add("torch.Tensor.cuda", node)
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if name := self._dotted(node):
            self._add(name, None)
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if name := self._imported.get(node.id):
            self._add(name, None)

    def _dotted(self, node: ast.expr) -> str | None:
        """Return the dotted name of an expression whose first name is imported or has a known class."""
        if isinstance(node, ast.Name):
            known = _CLASSES.get((self.file, node.id)) or self._classes.get(node.id)
            name = self._imported.get(node.id) or known
            return _ALIASES.get(name, name) if name else None
        if isinstance(node, ast.Attribute) and (owner := self._dotted(node.value)):
            if owner.rpartition(".")[0] in (*_CLASSES.values(), *self._classes.values()):
                return None  # of an attribute of an object, only the attribute itself is listed
            name = f"{owner}.{node.attr}"
            return _ALIASES.get(name, name)
        return None

    def _add(self, name: str, call: ast.Call | None) -> None:
        if not name.startswith(WATCHED):
            return
        unpacks = call is None or any(isinstance(argument, ast.Starred) for argument in call.args)
        keywords = () if call is None else tuple(k.arg for k in call.keywords if k.arg)
        positional = None if unpacks or call is None else len(call.args)
        unpacks_keywords = call is not None and any(keyword.arg is None for keyword in call.keywords)
        self.calls.add(OutsideCall(name, self.file, positional, keywords, unpacks_keywords))


def calls_of(file: str, text: str) -> set[OutsideCall]:
    """Return the watched calls of one of our files."""
    finder = _Finder(file)
    finder.visit(ast.parse(text))
    return finder.calls


def find_calls() -> list[OutsideCall]:
    """Return the watched calls of our source, in order of name."""
    files = [
        path
        for source in SOURCES
        for path in (
            sorted((PROJECT / source).rglob("*.py")) if (PROJECT / source).is_dir() else [PROJECT / source]
        )
    ]
    found: set[OutsideCall] = set()
    for path in files:
        found |= calls_of(str(path.relative_to(PROJECT)), path.read_text("utf-8"))
    return sorted(found, key=lambda call: (call.text, call.file))


@cache
def installed() -> Package:
    """Return the finder for the pinned packages."""
    return Package(Installed())


def accepts(definition: Definition, call: OutsideCall) -> bool:
    """Return whether the parameters accept the arguments of a call and lack none, as far as the call shows them."""
    if definition.parameters is None or call.positional is None:
        return True
    parameters = definition.parameters
    bind = parameters.bind_partial if call.unpacks_keywords else parameters.bind
    try:
        bind(*[...] * call.positional, **dict.fromkeys(call.keywords, ...))
    except TypeError:
        return False
    return True


def describe(package: Package, call: OutsideCall) -> str:
    """Return "file:line" of the definition that accepts a call, or the reason why there is none."""
    definition = package.find(call.name)
    if definition is None:
        return "missing"
    if not accepts(definition, call):
        return f"{definition.path}:{definition.line} does not accept these arguments: {definition.parameters}"
    return f"{definition.path}:{definition.line}"


def listed(torch_2_11: Mapping[str, str] | Package) -> list[dict[str, Any]]:
    """Return the list: call, our files, and the defining lines. `torch_2_11` is a finder, or call -> line of an earlier list."""
    entries: dict[str, dict[str, Any]] = {}
    calls = find_calls()
    called = {call.name for call in calls if call.positional is not None}
    for call in calls:
        if call.positional is None and call.name in called:
            continue
        entry = entries.setdefault(call.text, {"call": call.text, "files": []})
        entry["files"].append(call.file)
        entry["defined at"] = describe(installed(), call)
        if call.name.startswith("torch."):
            known = (
                describe(torch_2_11, call) if isinstance(torch_2_11, Package) else torch_2_11.get(call.text)
            )
            entry["in torch 2.11"] = known
    return list(entries.values())


def write_list(wheel: Path) -> None:
    """Write the list, with torch 2.11's lines from its wheel."""
    entries = listed(Package(Wheel(wheel)))
    LIST.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    write_list(Path(sys.argv[1]))
