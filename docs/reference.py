"""Writes docs/reference.md: what may be imported, by its signature and docstring.

python docs/reference.py
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_suffix(".md")
MODULES = ("latro_kernels", "latro", "latro.model", "latro.objectives", "latro.rollout", "latro.tasks", "latro.explore")
HEAD = """# Reference

What may be imported by others, from its docstrings: `python docs/reference.py` writes this page. Names that are not
here may change from version to version. [README](../README.md) shows how they go together.
"""
WIDTH = 100  # of a signature on one line


def page() -> str:
    return "\n".join([HEAD, *(part for module in MODULES for part in _module(module))])


def _module(name: str) -> list[str]:
    module = importlib.import_module(name)
    parts = [f"## {name}\n", f"{_first_line(module)}\n"]
    for public in _public(module):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            parts += [f"### {public}\n", _block(value, public)]
    return parts


def _public(module: Any) -> list[str]:
    """Of a module without __all__, what it defines itself."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def _block(value: Any, name: str) -> str:
    lines = [] if _is_config(value) else [signature(value, name)]
    lines += [_indented(_doc(value))] if _doc(value) else []
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if not method.startswith("_") and (called := _called(function)) is not None and _doc(called):
                lines += ["", "    " + signature(called, f".{method}").replace("\n", "\n    ")]
                lines.append(_indented(_doc(called), 8))
    if _is_config(value):
        lines += ["", *(f"    {line}" for line in _options(value))]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def signature(value: Any, name: str) -> str:
    """On one line where there is room, or else an argument on each."""
    if getattr(value, "_is_protocol", False):
        return name
    try:
        found = inspect.signature(value)
    except ValueError:
        return name
    arguments = _arguments(found)
    result = _written(found.return_annotation)
    behind = "" if result in ("", "None") else f" -> {result}"
    line = f"{name}({', '.join(arguments)}){behind}"
    return line if len(line) <= WIDTH else f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){behind}"


def _arguments(found: inspect.Signature) -> list[str]:
    """As they are written, with the star before those that go by name."""
    written: list[str] = []
    star = False
    for one in found.parameters.values():
        if one.name in ("self", "cls"):
            continue
        if one.kind is one.KEYWORD_ONLY and not star:
            written.append("*")
        star = star or one.kind in (one.KEYWORD_ONLY, one.VAR_POSITIONAL)
        default = _AsItIs("...") if inspect.isfunction(one.default) else one.default
        written.append(str(one.replace(annotation=_AsItIs(_written(one.annotation)), default=default)))
    return written


class _AsItIs(str):
    """Without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _written(annotation: Any) -> str:
    if annotation in (inspect.Signature.empty, None):
        return ""
    if isinstance(annotation, str):
        return annotation
    return getattr(annotation, "__forward_arg__", None) or inspect.formatannotation(annotation)


def _called(value: Any) -> Any:
    """A function, a method of any kind, or None."""
    value = getattr(value, "__func__", value)
    return value if inspect.isfunction(value) else None


def _doc(value: Any) -> str:
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    # A dataclass without one is given its signature.
    generated = inspect.isclass(value) and is_dataclass(value) and (own or "").startswith(f"{value.__name__}(")
    return "" if generated else inspect.cleandoc(own or "")


def _first_line(module: Any) -> str:
    return _doc(module).partition("\n\n")[0].replace("\n", " ")


def _indented(text: str, by: int = 4) -> str:
    return "\n".join(" " * by + line if line else "" for line in text.splitlines())


def _is_config(value: Any) -> bool:
    return is_dataclass(value) and any("help" in one.metadata for one in fields(value))


def _options(config: Any) -> list[str]:
    """Its own, not those of transformers."""
    own = [f"{one.name}: {one.metadata['help']}" for one in fields(config) if one.name in config.__annotations__]
    return [line for option in own for line in textwrap.wrap(option, 110, subsequent_indent=" " * 4)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
