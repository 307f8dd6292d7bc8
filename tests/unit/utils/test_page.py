from pathlib import Path

import pytest
from jinja2 import UndefinedError

from utils.page import render_page


def template(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "a.html.j2"
    path.write_text(
        '{% extends "page.html.j2" %}{% from "facts.html.j2" import facts %}'
        f"{{% block title %}}a & b{{% endblock %}}{{% block content %}}{content}{{% endblock %}}"
    )
    return path


def test_text_is_escaped_in_elements_attributes_and_shared_parts(tmp_path: Path):
    content = '<p class="{{ text }}">{{ text }}</p>{{ facts([(text, text)]) }}'
    page = render_page(template(tmp_path, content), text='"><b>')
    assert page.count("&#34;&gt;&lt;b&gt;") == 4
    assert "<b>" not in page


def test_missing_variable_is_an_error(tmp_path: Path):
    with pytest.raises(UndefinedError, match="figure"):
        render_page(template(tmp_path, "{{ figure }}"))


def test_number_filters_format_thousands_and_bytes(tmp_path: Path):
    page = render_page(template(tmp_path, "{{ 12345 | thousands }} {{ 2048 | bytes }}"))
    assert "12,345 2.0 KiB" in page
