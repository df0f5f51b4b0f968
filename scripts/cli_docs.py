"""Writes docs/cli.md from the command line's own definitions; --check fails if it is stale."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from lance_edge.cli import TOOLS, app, tool

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"


def main() -> int:
    """Write or check the file."""
    text = render()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write("docs/cli.md is stale; run python scripts/cli_docs.py\n")
    return 1


def render() -> str:
    """The page."""
    parts = [
        "# Command line",
        "Made from the commands' own definitions by `scripts/cli_docs.py`; `lance-edge COMMAND --help` "
        "says the same.",
        str(app.info.epilog),
    ]
    parts += commands(app, "lance-edge")
    for name in TOOLS:
        parts += commands(tool(name), f"lance-edge {name}")
    return "\n\n".join(parts) + "\n"


def commands(group: typer.Typer, called: str) -> list[str]:
    """The paragraphs on a group's commands; one that has no callback is its only command."""
    parts = []
    alone = group.registered_callback is None and len(group.registered_commands) == 1
    for registered in group.registered_commands:
        assert registered.callback is not None
        command = inspect.unwrap(registered.callback)
        name = called if alone else f"{called} {command.__name__}"
        parts.append(f"## {name}\n\n{inspect.getdoc(command)}")
        hints = get_type_hints(command, include_extras=True)
        parameters = inspect.signature(command).parameters.values()
        rows = [row(parameter, hints[parameter.name]) for parameter in parameters]
        if rows:
            parts.append("\n".join(["| option | meaning | default |", "|---|---|---|", *rows]))
    return parts


def row(parameter: inspect.Parameter, hint: Any) -> str:
    """One option or argument."""
    kind, declared = get_args(hint)[:2]
    if isinstance(declared, ArgumentInfo):
        kinds = (kind, *get_args(kind))  # of `list[str] | None`, too
        several = "..." if any(get_origin(part) is list for part in kinds) else ""
        return f"| `{parameter.name.upper()}{several}` | {declared.help} | |"
    # In Annotated, the first name that an option declares stands in the place of its default.
    declared_names = [declared.default, *(declared.param_decls or ())]
    names = [name for name in declared_names if isinstance(name, str) and name.startswith("-")]
    names = names or [f"--{parameter.name.replace('_', '-')}"]
    meaning = declared.help
    if get_origin(kind) is Literal:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in get_args(kind))}."
    default = "" if parameter.default in (None, False) else parameter.default
    if parameter.default is inspect.Parameter.empty:
        default = "required"
    shown = declared.show_default if isinstance(declared.show_default, str) else default
    return f"| {', '.join(f'`{name}`' for name in names)} | {meaning} | {shown} |"


if __name__ == "__main__":
    sys.exit(main())
