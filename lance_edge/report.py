"""Verdicts as a table, JSON or JSON lines, written as they come."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from typing import Any, Literal, TextIO

from lance_edge.inputs import Item
from lance_edge.verdict import Edit, Verdict

OutputFormat = Literal["table", "json", "jsonl"]

EXCERPT = 60  # characters of a prompt in a table row
LONGEST_KEPT = 160  # characters of an unchanged stretch; of longer ones the ends are shown
COLOURS = {
    "allow": "32",
    "advise": "36",
    "rewrite": "33",
    "review": "35",
    "block": "31",
    "error": "31",
    "insert": "32",
    "delete": "31;9",
}
# Without colours, edits are marked as `git diff --word-diff` marks them.
MARKS = {"keep": ("", ""), "insert": ("{+", "+}"), "delete": ("[-", "-]")}
INDENT = " " * 9
CLEAR = "\r\x1b[K"  # a line that was there before


class Report:
    """Writes one record per prompt, in the order they are given.

    with_prompt  put the prompt's text into JSON records too; the table always shows an excerpt
    explain      put the gradients into the table; JSON records always have them
    """

    def __init__(
        self, out: TextIO, output_format: OutputFormat, with_prompt: bool, explain: bool = False
    ) -> None:
        self._out = out
        self._explain = explain
        self._format = output_format
        self._with_prompt = with_prompt
        self._colour = out.isatty() and "NO_COLOR" not in os.environ
        self._written = 0

    def verdict(self, item: Item, verdict: Verdict) -> None:
        if self._format == "table":
            self._row(item, verdict)
        else:
            self._record(item, verdict.to_dict())

    def error(self, item: Item, message: str) -> None:
        """A prompt that could not be screened. In a table it goes to standard error alone."""
        if self._format != "table":
            self._record(item, {"error": message})

    def close(self) -> None:
        if self._format == "json":
            self._out.write("\n]\n" if self._written else "[]\n")
        self._out.flush()

    def flush(self) -> None:
        self._out.flush()

    def _record(self, item: Item, values: dict[str, Any]) -> None:
        record: dict[str, Any] = {"source": item.source, "line": item.line}
        if self._with_prompt and item.text is not None:
            record["prompt"] = item.text
        text = json.dumps({**record, **values})
        if self._format == "json":
            self._out.write((",\n" if self._written else "[\n") + text)
        else:
            self._out.write(text + "\n")
        self._written += 1

    def _row(self, item: Item, verdict: Verdict) -> None:
        highest = max(verdict.severity, key=verdict.severity.__getitem__)
        scores = ", ".join(
            f"{name} {verdict.severity[name]:.2f}±{verdict.deviation[name]:.2f}"
            for name in verdict.flagged[:3] or (highest,)
        )
        if not verdict.flagged:
            scores = f"(highest: {scores})"
        decision = self._paint(f"{verdict.decision:<7}", verdict.decision)
        text = excerpt(item.text or "", min((s.start for s in verdict.spans), default=0))
        place = "" if item.source is None else f"{printable(item.place)}  "
        self._out.write(f"{place}{decision}  {scores}  {printable(text)}\n")
        if verdict.spans:
            self._line(f"words: {_words(item.text or '', verdict)}")
        if verdict.reason is not None:
            self._line(f"because {verdict.reason}")
        if self._explain or verdict.reason is not None:
            for gradient in verdict.gradients:
                self._line(f"- {gradient.text}")
        if verdict.refined is not None:
            self._line(f"rewrite: {verdict.refined}")
            self._out.write(f"{INDENT}changes: {''.join(map(self._edit, verdict.diff))}\n")
        self._written += 1

    def _line(self, text: str) -> None:
        self._out.write(f"{INDENT}{printable(' '.join(text.split()))}\n")

    def _edit(self, edit: Edit) -> str:
        text = printable(re.sub(r"\s", " ", edit.text))
        if edit.kind == "keep" and len(text) > LONGEST_KEPT:
            half = LONGEST_KEPT // 2
            text = f"{text[:half]} … {text[-half:]}"
        if self._colour and edit.kind != "keep":
            return self._paint(text, edit.kind)
        before, after = MARKS[edit.kind]
        return f"{before}{text}{after}"

    def _paint(self, text: str, name: str) -> str:
        return f"\x1b[{COLOURS[name]}m{text}\x1b[0m" if self._colour else text


class Progress:
    """A line on standard error that counts prompts, if a person is looking."""

    def __init__(self, err: TextIO, enabled: bool) -> None:
        self._err = err
        self._enabled = enabled and err.isatty()
        self._started = self._shown = time.monotonic()

    def update(self, screened: int, not_allowed: int, failed: int) -> None:
        now = time.monotonic()
        if self._enabled and now - self._shown >= 0.2:
            self._shown = now
            rate = screened / max(1e-9, now - self._started)
            tell(
                f"\r{screened:,} screened, {not_allowed:,} not allowed, {failed:,} unreadable, {rate:,.0f}/s\x1b[K",
                self._err,
            )

    def clear(self) -> None:
        if self._enabled:
            tell(CLEAR, self._err)


class Steps:
    """A line on standard error that says what a long command is doing, and is cleared at the end."""

    def __init__(self, err: TextIO, enabled: bool) -> None:
        self._err, self._enabled, self._live = err, enabled, err.isatty()
        self._shown = ""

    def update(self, what: str, share: float) -> None:
        if not self._enabled:
            return
        if not self._live and what == self._shown:
            return
        start, end = ("\r", "\x1b[K") if self._live else ("", "\n")
        bar = f" {share:4.0%}" if self._live else ""
        tell(f"{start}{what}{bar}{end}", self._err)
        self._shown = what

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled and self._live and self._shown:
            tell(CLEAR, self._err)


def excerpt(text: str, at: int) -> str:
    """The text in one line; of a long one a part: its beginning, or what stands around a place."""
    line = " ".join(text.split())
    if len(line) <= EXCERPT:
        return line
    place = len(" ".join([*text[:at].split(), ""]))
    start = 0 if place < EXCERPT * 2 // 3 else place - EXCERPT // 3
    start = max(0, min(start, len(line) - EXCERPT + 1))
    before, after = "…" * (start > 0), "…" * (start + EXCERPT - 1 < len(line))
    return f"{before}{line[start : start + EXCERPT - len(before) - len(after)]}{after}"


def printable(text: str) -> str:
    """The text without characters that could steer a terminal or hide others."""
    return "".join(character if character.isprintable() else "�" for character in text)


def _words(text: str, verdict: Verdict) -> str:
    seen: dict[str, None] = {}
    for span in verdict.spans:
        seen.setdefault(" ".join(text[span.start : span.end].split()))
    return " | ".join(seen)


def complain(message: str) -> None:
    """One sentence on standard error, in the place of a progress line if there is one."""
    clear = CLEAR if sys.stderr.isatty() else ""
    tell(f"{clear}lance-edge: {printable(message)}\n", sys.stderr)


def tell(text: str, err: TextIO) -> None:
    """Write to standard error. Where that fails, the command goes on without: its result counts."""
    try:
        err.write(text)
        err.flush()
    except OSError:
        discard(err)


def discard(stream: TextIO) -> None:
    """What is still in the buffer cannot be written; the interpreter would try again, and exit with 120."""
    try:
        descriptor = stream.fileno()
    except OSError:  # a stand-in without a file, as in tests
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
