"""Prompts from the command line, files and standard input, one at a time.

A line that cannot be read becomes an item with an error; the lines after it are still read.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Literal

from lance_edge.errors import InputError

InputFormat = Literal["auto", "lines", "jsonl", "csv"]

LINE_LIMIT = 64 * 2**20  # bytes; no line is held in memory beyond this
SUFFIXES: dict[str, InputFormat] = {
    ".txt": "lines",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}

TOO_LONG = "the line is longer than {limit} MiB"

_UNDECODABLE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of invalid UTF-8
NOT_READ = (".json", ".tsv", ".parquet", ".xlsx", ".gz", ".zip", ".pdf", ".docx")
OTHER_FILES = (".md", ".log", ".html", ".xml", ".yaml", ".yml")  # read as lines where they exist

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Item:
    """One prompt, or why there is none.

    source  the file's path, "-" for standard input, None for a text on the command line
    line    where it starts in the source, from 1; None for a text on the command line
    blank   an empty line of a text file: it parts prompts and is none
    """

    source: str | None
    line: int | None
    text: str | None = None
    error: str | None = None
    blank: bool = False

    @property
    def place(self) -> str:
        """Where it stands, for people: `prompts.txt:3`."""
        return "prompt" if self.source is None else f"{self.source}:{self.line}"


def read_items(
    arguments: Sequence[str], field: str, input_format: InputFormat = "auto", as_text: bool = False
) -> Iterator[Item]:
    """The prompts that the arguments stand for: texts, files, globs, or "-".

    Raises InputError, before anything is read, if an argument looks like a file and none is there.
    """
    sources = [_source(argument, input_format, as_text) for argument in arguments]
    return (item for source in sources for item in _read(source, field, input_format))


def _source(argument: str, input_format: InputFormat, as_text: bool) -> str | list[Path] | None:
    """The text or the files that an argument stands for; None is standard input."""
    if as_text or not argument:
        return argument
    if argument == "-":
        return None
    if _exists(argument):
        if Path(argument).is_dir():
            raise InputError(
                f"{argument} is a folder; name its files, for example {argument.rstrip('/')}/*.txt"
            )
        return [_readable(Path(argument), input_format)]
    if _is_broken_link(argument):
        raise InputError(f"{argument} is a link to a file that is not there")
    if any(character in argument for character in "*?[") and not re.search(r"\s", argument):
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        if files := [path for path in matches if path.is_file()]:
            return [_readable(path, input_format) for path in files]
        if matches:
            raise InputError(f"{argument} matches only folders; name their files")
        if _looks_like_path(argument):
            raise InputError(f"no file matches {argument}; to screen it as a prompt, add --text")
    elif _looks_like_path(argument):
        raise InputError(f"there is no file {argument}; to screen it as a prompt, add --text")
    return argument


def format_of(path: Path, input_format: InputFormat) -> InputFormat:
    """How a file is read: as it was said, or after its name."""
    return SUFFIXES.get(path.suffix.lower(), "lines") if input_format == "auto" else input_format


def _readable(path: Path, input_format: InputFormat) -> Path:
    if input_format == "auto" and path.suffix.lower() in NOT_READ:
        raise InputError(
            f"{path} is a kind of file that is not read; convert it to JSON lines, CSV or plain lines, "
            "or say what it is with --input"
        )
    return path


def _exists(argument: str) -> bool:
    try:
        return Path(argument).exists()
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        return False


def _is_broken_link(argument: str) -> bool:
    """Whether it is a symbolic link, of an argument that does not exist."""
    try:
        return Path(argument).is_symlink()
    except (OSError, ValueError):
        return False


def _looks_like_path(argument: str) -> bool:
    has_space = re.search(r"\s", argument) is not None
    return not has_space and (
        "/" in argument or Path(argument).suffix.lower() in (*SUFFIXES, *NOT_READ, *OTHER_FILES)
    )


def _read(source: str | list[Path] | None, field: str, input_format: InputFormat) -> Iterator[Item]:
    if isinstance(source, str):
        yield Item(None, None, source)
        return
    if source is None:
        if sys.stdin is None:
            raise InputError("standard input is closed; name a file, or give the prompt itself")
        piped: InputFormat = "lines" if input_format == "auto" else input_format
        yield from read_stream(sys.stdin.buffer, "-", field, piped)
        return
    for path in source:
        try:
            with path.open("rb") as stream:
                yield from read_stream(stream, str(path), field, format_of(path, input_format))
        except OSError as error:
            yield Item(str(path), 1, error=f"the file cannot be read: {error.strerror}")


def read_stream(stream: BinaryIO, source: str, field: str, kind: InputFormat) -> Iterator[Item]:
    """The prompts of one open file; `field` names the JSON key or CSV column that holds them."""
    lines = _lines(stream)
    first = next(lines, None)
    if first is None:
        return
    if first[1] is not None and first[1].startswith(_UTF16_MARKS):
        yield Item(source, 1, error="the file is UTF-16; save it as UTF-8")
        return
    lines = chain([first], lines)
    if kind == "csv":
        yield from _read_csv(lines, source, field)
        return
    for number, line in lines:
        if line is None:
            yield Item(source, number, error=TOO_LONG.format(limit=LINE_LIMIT // 2**20))
        elif kind == "jsonl":
            yield _json_item(line, source, number, field)
        else:
            yield _text_item(line, source, number)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends; None in place of one that is too long."""
    number = 0
    while line := stream.readline(LINE_LIMIT):
        number += 1
        if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
            while (rest := stream.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        # A mark of UTF-8 begins a file, and lines within files that were put together.
        yield number, line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")


def _text_item(line: bytes, source: str, number: int) -> Item:
    if not line.strip():
        return Item(source, number, blank=True)
    try:
        text = line.decode("utf-8")
        return Item(source, number, blank=True) if text.isspace() else Item(source, number, text)
    except UnicodeDecodeError as error:
        return Item(source, number, error=f"the line is not valid UTF-8 (byte {error.start + 1})")


def _json_item(line: bytes, source: str, number: int, field: str) -> Item:
    if not line.strip():
        return Item(source, number, blank=True)
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=partial(_object, field))
    except UnicodeDecodeError as error:
        return Item(source, number, error=f"the line is not valid UTF-8 (byte {error.start + 1})")
    except RecursionError:
        return Item(source, number, error="the line's JSON is nested too deeply")
    except json.JSONDecodeError as error:
        message = f"the line is not valid JSON: {error.msg} (character {error.pos + 1})"
        return Item(source, number, error=message)
    except ValueError as error:  # a number with too many digits
        return Item(source, number, error=f"the line is not valid JSON: {error}")
    if isinstance(value, str):
        return Item(source, number, value)
    if isinstance(value, _Doubled):
        return Item(source, number, error=f"the object has the field {field!r} twice")
    if not isinstance(value, dict):
        return Item(source, number, error=f"the line holds {kind_of(value)}, not an object")
    if field not in value:
        keys = ", ".join(list(value)[:8]) or "no fields"
        return Item(
            source, number, error=f"the object has no field {field!r}; it has {keys} (see --field)"
        )
    if not isinstance(value[field], str):
        return Item(
            source,
            number,
            error=f"field {field!r} holds {kind_of(value[field])}, not a string",
        )
    return Item(source, number, value[field])


class _Doubled(dict[str, object]):
    """An object with two values for the field that holds the prompt: one of them would be lost."""


def _object(field: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, at any depth."""
    made = dict(pairs)
    is_doubled = len(made) < len(pairs) and [key for key, _ in pairs].count(field) > 1
    return _Doubled(made) if is_doubled else made


def kind_of(value: object) -> str:
    """What a value of JSON is called there."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value), "a number")


def _read_csv(lines: Iterable[tuple[int, bytes | None]], source: str, field: str) -> Iterator[Item]:
    csv.field_size_limit(LINE_LIMIT)
    taken = _Taken()
    reader = csv.reader(taken.track(lines), strict=True)
    column: int | None = None
    columns = 0
    while True:
        start = taken.line + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cause = f"the row is not valid CSV: {error}"
            if taken.is_done:
                cause = f"a quote opens here and is never closed; nothing was read to the end, line {taken.line}"
            yield Item(source, start, error=cause)
            if column is None:
                return  # without a header, nothing below can be read
            continue
        if not row:
            continue
        if column is None:
            if field not in row:
                # The names stay unsaid: where there is no header, they are a prompt.
                missing = f"the header has no column {field!r} among its {len(row)} (see --field)"
                if len(row) == 1 and re.search(r"[;\t]", row[0]):
                    missing += "; columns are parted by commas"
                yield Item(source, start, error=missing)
                return
            if row.count(field) > 1:
                yield Item(
                    source, start, error=f"the header has {row.count(field)} columns {field!r}"
                )
                return
            column, columns = row.index(field), len(row)
        elif taken.too_long >= start:
            yield Item(source, start, error=TOO_LONG.format(limit=LINE_LIMIT // 2**20))
        elif column >= len(row):
            short = f"the row has {len(row)} columns and {field!r} is number {column + 1}"
            yield Item(source, start, error=short)
        elif len(row) > columns:
            # A prompt with a comma that nobody quoted: its end would be lost.
            more = (
                f"the row has {len(row)} columns and the header {columns}; quote what holds commas"
            )
            yield Item(source, start, error=more)
        elif _UNDECODABLE.search(row[column]):
            yield Item(source, start, error="the row is not valid UTF-8")
        else:
            yield Item(source, start, row[column])


class _Taken:
    """Numbers of the last line that a csv reader took, and of the last that was too long for it.

    is_done  whether the reader asked for a line after the last: what it then fails at is an open quote
    """

    def __init__(self) -> None:
        self.line = self.too_long = 0
        self.is_done = False

    def track(self, lines: Iterable[tuple[int, bytes | None]]) -> Iterator[str]:
        for number, line in lines:
            self.line = number
            if line is None:
                self.too_long = number
            # The place of a line that is too long is held by a column, so that its row is reported.
            contents = b"-" if line is None else line
            yield contents.decode("utf-8", errors="surrogateescape") + "\n"
        self.is_done = True
