"""Write settings as YAML."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from configs.yaml_source import plain_scalar

_INDENT = 2  # indentation of yaml.dump


def commented_yaml(settings: Mapping[str, Any], comments: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of settings as YAML, with these comments after the lines of their keys (dotted for sections)."""
    above: list[str] = []
    for line in dump(settings).splitlines():
        depth = (len(line) - len(line.lstrip())) // _INDENT
        above = [*above[:depth], line.strip().partition(":")[0]]
        comment = comments.get(".".join(above))
        yield f"{line}  # {comment}" if comment else line


def dump(settings: Mapping[str, Any]) -> str:
    """Return settings as YAML, one key per line."""
    return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which YAML would otherwise read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    reads_as_text = isinstance(plain_scalar(text), str) and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if reads_as_text else '"')


_Dumper.add_representer(str, _represent_text)


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=1_000_000)
    return text.removesuffix("\n...\n").strip()
