"""HTML pages that need nothing else: no script, no request. Text is escaped where it comes in."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:normal}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;padding:.8rem;color:#666}"
    "ul{margin:.2rem 0;padding-left:1.2rem}svg{max-width:100%;height:auto}"
)


@dataclass(frozen=True)
class Link:
    """Text that leads somewhere."""

    text: str
    address: str

    def to_html(self) -> str:
        """An `<a>` element."""
        return f'<a href="{html.escape(self.address)}">{html.escape(self.text)}</a>'


def page(title: str, *sections: str, style: str = "") -> str:
    """A whole page of sections that are HTML."""
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}{style}</style><h1>{name}</h1>{''.join(sections)}</html>"
    )


def facts(items: Iterable[tuple[str, str]]) -> str:
    """A table of names and values; values are HTML."""
    return f"<table>{''.join(f'<tr><th>{html.escape(name)}</th><td>{value}</td></tr>' for name, value in items)}</table>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str | Link]]) -> str:
    """A table of text and links; columns whose heading begins with > are numbers."""
    kinds = [' class="n"' if heading.startswith(">") else "" for heading in headings]
    head = "".join(
        f"<th{kind}>{html.escape(heading.removeprefix('>'))}</th>"
        for kind, heading in zip(kinds, headings, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{_cell(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(content: str | Link) -> str:
    return content.to_html() if isinstance(content, Link) else html.escape(content)


def preformatted(text: str) -> str:
    """Text as it is, lines and all."""
    return f"<pre>{html.escape(text)}</pre>"
