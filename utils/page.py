"""Self-contained HTML pages from jinja2 templates: no scripts, and no requests to other servers."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.files import format_bytes


def render_page(template: Path, **values: Any) -> str:
    """Return the HTML page of a template.

    Args:
        template: template file. It extends `page.html.j2`, which is stored next to this module.
        values: template variables. Text is escaped, also in attributes; a missing variable is an error.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "bytes": format_bytes}
    return environment.get_template(template.name).render(values)
