"""Write config.toml: every setting with default, unit and meaning, from the dataclasses and their fields' docstrings.

    python -m agent.config_file > config.toml

Run it after adding or changing a setting; tests/agent/test_config.py compares the file with what this prints.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from agent.config import DERIVED, Config

_HEAD = """\
# Every setting of the agent, with its default, unit and meaning. Written by `python -m agent.config_file`; change
# values here, or keep a shorter file of your own (what it leaves out has the default) and give it with --config FILE.
# Unknown keys, wrong types and values out of range stop the start. Secrets come by environment or file only.
"""


def render(config: Config) -> str:
    """The text of config.toml with the values of `config`."""
    sections = [_HEAD]
    for name, kind in get_type_hints(Config).items():
        lines = ["", *_comment(_first_paragraph(kind)), f"[{name}]"]
        meanings = field_docstrings(kind)
        for field in dataclasses.fields(kind):
            if (name, field.name) in DERIVED:
                continue
            lines += ["", *_comment(meanings[field.name])]
            lines.append(f"{field.name} = {_toml(getattr(getattr(config, name), field.name))}")
        sections.append("\n".join(lines) + "\n")
    return "".join(sections)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width=118, initial_indent="# ", subsequent_indent="# ")


def field_docstrings(kind: type) -> dict[str, str]:
    """Field name -> the string literal that stands under it (Python itself throws these away)."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef), kind
    return dict(_documented(definition))


def _documented(definition: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        match following:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield statement.target.id, text


def _first_paragraph(kind: type) -> str:
    doc = inspect.cleandoc(kind.__doc__ or "")
    return "" if doc.startswith(f"{kind.__name__}(") else " ".join(doc.split("\n\n")[0].split())


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False)  # a TOML basic string is a JSON string
    raise TypeError(f"no TOML form for {value!r}")


if __name__ == "__main__":
    print(render(Config()), end="")
