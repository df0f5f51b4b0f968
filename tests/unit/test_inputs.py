"""What arguments stand for, and which prompts files of each kind hold."""

from __future__ import annotations

import io
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lance_edge import inputs
from lance_edge.errors import InputError
from lance_edge.inputs import InputFormat, Item, read_items, read_stream


def items(contents: bytes, kind: InputFormat, field: str = "prompt") -> list[Item]:
    return list(read_stream(io.BytesIO(contents), "f", field, kind))


def found(contents: bytes, kind: InputFormat, field: str = "prompt") -> list[tuple[object, ...]]:
    """Line and text of each item; the error in place of the text, as a list."""
    return [
        (item.line, item.text if item.error is None else [item.error])
        for item in items(contents, kind, field)
    ]


# Text files


def test_each_line_is_a_prompt() -> None:
    assert items(b"hello\nbomb", "lines") == [
        Item("f", 1, "hello"),
        Item("f", 2, "bomb"),
    ]


def test_only_the_line_end_is_taken_off() -> None:
    assert found(b"  a \t\r\n\xc2\xa0b\n", "lines") == [(1, "  a \t"), (2, "\xa0b")]


def test_windows_files_read_like_others() -> None:
    assert found(b"\xef\xbb\xbfhello\r\nbomb\r\n", "lines") == [(1, "hello"), (2, "bomb")]


def test_files_that_were_put_together_have_marks_within() -> None:
    assert found(b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", "lines") == [(1, "a"), (2, "b")]
    two = b'\xef\xbb\xbf{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "b"}\n'
    assert found(two, "jsonl") == [(1, "a"), (2, "b")]


def test_blank_lines_count_and_are_no_prompts() -> None:
    assert items("a\n\n \t\r\nb\n\u3000\u00a0\n".encode(), "lines") == [
        Item("f", 1, "a"),
        Item("f", 2, blank=True),
        Item("f", 3, blank=True),
        Item("f", 4, "b"),
        Item("f", 5, blank=True),
    ]


@pytest.mark.parametrize("kind", ["lines", "jsonl", "csv"])
def test_an_empty_file_holds_nothing(kind: InputFormat) -> None:
    assert items(b"", kind) == []


def test_invalid_utf8_costs_one_line() -> None:
    assert found(b"a\nab\xff\nb\n", "lines") == [
        (1, "a"),
        (2, ["the line is not valid UTF-8 (byte 3)"]),
        (3, "b"),
    ]


@pytest.mark.parametrize("kind", ["lines", "jsonl", "csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_named_once(kind: InputFormat, encoding: str) -> None:
    contents = "\ufeffprompt\nhello\n".encode(encoding)
    assert found(contents, kind) == [(1, ["the file is UTF-16; save it as UTF-8"])]


@pytest.mark.parametrize("kind", ["lines", "jsonl"])
@pytest.mark.parametrize("length", [2**20, 2**20 + 1, 3 * 2**20])
def test_an_overlong_line_costs_itself(
    monkeypatch: pytest.MonkeyPatch, kind: InputFormat, length: int
) -> None:
    monkeypatch.setattr(inputs, "LINE_LIMIT", 2**20)
    contents = b'"a"\n' + b"x" * length + b'\n"b"\n'
    first, overlong, last = found(contents, kind)
    assert overlong == (2, ["the line is longer than 1 MiB"])
    assert (first[0], last[0]) == (1, 3)
    assert (str(first[1]).strip('"'), str(last[1]).strip('"')) == ("a", "b")


def test_an_overlong_last_line_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LINE_LIMIT", 2**20)
    assert found(b"a\n" + b"x" * (2**20 + 5), "lines") == [
        (1, "a"),
        (2, ["the line is longer than 1 MiB"]),
    ]


def test_no_more_than_the_limit_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LINE_LIMIT", 16)

    class Recorder(io.BytesIO):
        largest = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            self.largest = max(self.largest, len(line))
            return line

    stream = Recorder(b"x" * 1000 + b"\nb\n")
    assert [item.line for item in read_stream(stream, "f", "prompt", "lines")] == [1, 2]
    assert stream.largest == 16


# JSON lines


def test_the_field_or_the_string_is_the_prompt() -> None:
    contents = b'{"prompt": "a", "id": 1}\n"b"\n\n{"prompt": ""}\n'
    assert found(contents, "jsonl") == [(1, "a"), (2, "b"), (3, None), (4, "")]
    assert [item.blank for item in items(contents, "jsonl")] == [False, False, True, False]


def test_another_field_can_be_named() -> None:
    assert found(b'{"prompt": "a", "text": "b"}\n', "jsonl", "text") == [(1, "b")]


def test_json_lines_may_start_with_a_byte_order_mark() -> None:
    assert found(b'\xef\xbb\xbf{"prompt": "a"}\r\n', "jsonl") == [(1, "a")]


def test_a_lone_surrogate_is_kept_for_the_tokenizer_to_refuse() -> None:
    assert found(b'{"prompt": "a\\ud800"}\n', "jsonl") == [(1, "a\ud800")]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"id": 1, "text": "a"}', "the object has no field 'prompt'; it has id, text"),
        (b"{}", "the object has no field 'prompt'; it has no fields"),
        (b'{"prompt": 7}', "field 'prompt' holds a number, not a string"),
        (b'{"prompt": null}', "field 'prompt' holds null, not a string"),
        (b'{"prompt": true}', "field 'prompt' holds true, not a string"),
        (b'{"prompt": ["a"]}', "field 'prompt' holds a list, not a string"),
        (b'["a"]', "the line holds a list, not an object"),
        (b"7", "the line holds a number, not an object"),
        (b'{"prompt": "a"', "the line is not valid JSON: Expecting ',' delimiter"),
        (b"a prompt", "the line is not valid JSON: Expecting value"),
        (b'{"prompt": "a\xff"}', "the line is not valid UTF-8 (byte 14)"),
        (b"[" * 100_000, "the line's JSON is nested too deeply"),
        (b'{"prompt":' * 100_000, "the line's JSON is nested too deeply"),
        (b"9" * 5000, "the line"),  # Python refuses to read such an integer, or it is no object
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_json_line_costs_itself(line: bytes, error: str) -> None:
    before, wrong, after = items(b'"a"\n' + line + b'\n"b"\n', "jsonl")
    assert (before.text, wrong.text, after.text) == ("a", None, "b")
    assert wrong.line == 2
    assert wrong.error is not None
    assert wrong.error.startswith(error)


def test_the_only_line_number_in_a_json_error_is_the_files() -> None:
    """json counts lines too; inside one line it always says 1, which misleads."""
    (_, broken) = items(b'"a"\n{"prompt": }\n', "jsonl")
    assert broken.place == "f:2"
    assert broken.error is not None
    assert "line 1" not in broken.error


# CSV


def test_the_column_is_found_by_its_name() -> None:
    assert found(b"id,prompt\n1,a\n2,b\n", "csv") == [(2, "a"), (3, "b")]
    assert found(b"\xef\xbb\xbfprompt,id\r\na,1\r\n", "csv") == [(2, "a")]
    assert found(b"id,text\n1,a\n", "csv", "text") == [(2, "a")]


def test_quoted_newlines_belong_to_the_prompt() -> None:
    contents = b'id,prompt\n1,"two\nlines, ""quoted"""\n\n2,b\n3,"x\r\ny\n\nz"\n4,d\n'
    assert found(contents, "csv") == [
        (2, 'two\nlines, "quoted"'),
        (5, "b"),
        (6, "x\ny\n\nz"),
        (10, "d"),
    ]


def test_a_missing_column_is_reported_once() -> None:
    assert found(b"id,text\n1,a\n2,b\n", "csv") == [
        (1, ["the header has no column 'prompt' among its 2 (see --field)"])
    ]


def test_columns_that_something_else_parts_are_said_to_be() -> None:
    for header in (b"id;prompt", b"id\tprompt"):
        ((_, (error,)),) = found(header + b"\n1;a\n", "csv")
        assert error.endswith("among its 1 (see --field); columns are parted by commas")


def test_a_broken_header_ends_the_file() -> None:
    """The row after it holds a prompt and is no header."""
    assert found(b'"prompt"s,id\na,1\nb,2\n', "csv") == [
        (1, ["the row is not valid CSV: ',' expected after '\"'"])
    ]


def test_a_short_row_costs_itself() -> None:
    assert found(b"id,prompt\n1,a\n2\n3,c\n", "csv") == [
        (2, "a"),
        (3, ["the row has 1 columns and 'prompt' is number 2"]),
        (4, "c"),
    ]


def test_a_row_with_a_comma_that_nobody_quoted_is_not_cut() -> None:
    assert found(b'prompt\na\nbake a cake, then a bomb\n"b, c"\n', "csv") == [
        (2, "a"),
        (3, ["the row has 2 columns and the header 1; quote what holds commas"]),
        (4, "b, c"),
    ]


def test_a_column_that_stands_twice_is_asked_about() -> None:
    assert found(b"prompt,id,prompt\na,1,b\n", "csv") == [
        (1, ["the header has 2 columns 'prompt'"])
    ]


def test_a_wrongly_quoted_row_costs_itself() -> None:
    before, wrong, after = items(b'prompt,id\na,1\n"b"x,2\nc,3\n', "csv")
    assert (before.text, after.text) == ("a", "c")
    assert (before.line, wrong.line, after.line) == (2, 3, 4)
    assert wrong.error == "the row is not valid CSV: ',' expected after '\"'"


def test_an_unclosed_quote_is_reported_where_it_opens() -> None:
    assert found(b'prompt,id\na,1\n"b,2\nc,3\n', "csv") == [
        (2, "a"),
        (
            3,
            ["a quote opens here and is never closed; nothing was read to the end, line 4"],
        ),
    ]


def test_a_wrong_last_row_is_no_open_quote() -> None:
    assert found(b'prompt,id\na,1\n"b"x,2\n', "csv") == [
        (2, "a"),
        (3, ["the row is not valid CSV: ',' expected after '\"'"]),
    ]


def test_an_object_with_the_field_twice_is_asked_about() -> None:
    lines = b'{"prompt": "a", "prompt": "b"}\n{"id": 1, "id": 2, "prompt": "c"}\n'
    lines += b'{"prompt": "d", "was": {"prompt": "e", "prompt": "f"}}\n'
    twice = ["the object has the field 'prompt' twice"]
    assert found(lines, "jsonl") == [(1, twice), (2, "c"), (3, "d")]


def test_an_invalid_utf8_row_costs_itself() -> None:
    assert found(b"id,prompt\n1,a\n2,b\xff\n3,c\n", "csv") == [
        (2, "a"),
        (3, ["the row is not valid UTF-8"]),
        (4, "c"),
    ]


def test_other_columns_may_be_in_any_encoding() -> None:
    assert found(b"id,prompt\n\xff,a\n", "csv") == [(2, "a")]


@pytest.mark.parametrize("header", [b"prompt,id", b"id,prompt"])
def test_an_overlong_row_is_called_that(monkeypatch: pytest.MonkeyPatch, header: bytes) -> None:
    monkeypatch.setattr(inputs, "LINE_LIMIT", 2**20)
    contents = header + b"\na,b\n" + b"x" * 2**20 + b",1\nc,d\n"
    before, overlong, after = items(contents, "csv")
    assert (before.line, after.line) == (2, 4)
    assert overlong.line == 3
    assert overlong.error is not None
    assert "longer than 1 MiB" in overlong.error


# Arguments


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(*arguments: str, as_text: bool = False, **options: str) -> list[str | None]:
    chosen = {"field": "prompt", **options}
    return [item.text for item in read_items(arguments, as_text=as_text, **chosen)]  # type: ignore[arg-type]


def write(folder: Path, **files: str) -> None:
    """Files named like `a_txt` for a.txt."""
    for name, contents in files.items():
        (folder / name.replace("_", ".")).write_text(contents, encoding="utf-8")


def test_the_suffix_says_how_a_file_is_read(here: Path) -> None:
    line = '{"prompt": "json"}\n'
    write(here, a_txt=line, b_jsonl=line, c_NDJSON=line, d_csv="prompt\ncsv\n", e_log=line)
    assert texts("a.txt", "b.jsonl", "c.NDJSON", "d.csv", "e.log") == [
        line.strip(),
        "json",
        "json",
        "csv",
        line.strip(),
    ]
    assert texts("b.jsonl", input_format="lines") == [line.strip()]
    assert texts("a.txt", "d.csv", input_format="jsonl") == ["json", None, None]
    assert texts("b.jsonl", field="text") == [None]


def test_items_say_where_they_stand(here: Path) -> None:
    write(here, a_txt="x\n\ny\n")
    found_items = list(read_items(["hello", "a.txt"], "prompt"))
    assert [item.place for item in found_items] == ["prompt", "a.txt:1", "a.txt:2", "a.txt:3"]
    assert [item.source for item in found_items] == [None, "a.txt", "a.txt", "a.txt"]


def test_arguments_keep_their_order(here: Path) -> None:
    write(here, a_txt="1\n", b_txt="2\n")
    assert texts("b.txt", "say", "a.txt", "b.txt") == ["2", "say", "1", "2"]


def test_a_glob_is_its_files_in_order(here: Path) -> None:
    (here / "deep" / "er").mkdir(parents=True)
    (here / "z.txt").mkdir()
    write(here, b_txt="b", a_txt="a", c_csv="prompt\nc\n")
    write(here / "deep" / "er", d_txt="d")
    assert texts("*.txt") == ["a", "b"]
    assert texts("[ab].txt") == ["a", "b"]
    assert texts("**/*.txt") == ["a", "b", "d"]
    assert texts("?.csv") == ["c"]


def test_a_file_may_be_named_like_a_glob(here: Path) -> None:
    (here / "[a].txt").write_text("it", encoding="utf-8")
    (here / "a.txt").write_text("not it", encoding="utf-8")
    assert texts("[a].txt") == ["it"]


@pytest.mark.parametrize(
    "argument",
    [
        "hello",
        "Why?",
        "what is *this*",
        "is /etc/passwd a file.txt",
        "two\nlines/",
        "e.g.",
        "nul\0",
        "x" * 5000,
    ],
    ids=lambda text: ascii(text)[:24],
)
def test_what_cannot_be_a_file_is_a_text(here: Path, argument: str) -> None:
    assert list(read_items([argument], "prompt")) == [Item(None, None, argument)]


def test_a_link_to_nothing_is_no_text(here: Path) -> None:
    (here / "questions").symlink_to("gone")
    with pytest.raises(InputError, match="questions is a link to a file that is not there"):
        read_items(["questions"], "prompt")


@pytest.mark.parametrize(
    "argument", ["prompts.txt", "no/such", "logs.JSONL", "a.csv", "README.md", "a.json", "x.log"]
)
def test_a_missing_file_is_not_screened_as_a_text(here: Path, argument: str) -> None:
    with pytest.raises(InputError) as caught:
        read_items(["hello", argument], "prompt")
    assert str(caught.value) == f"there is no file {argument}; to screen it as a prompt, add --text"


@pytest.mark.parametrize("argument", ["*.txt", "logs/*", "[a].jsonl"])
def test_a_glob_without_files_is_not_screened_as_a_text(here: Path, argument: str) -> None:
    with pytest.raises(InputError) as caught:
        read_items([argument], "prompt")
    assert str(caught.value) == f"no file matches {argument}; to screen it as a prompt, add --text"


def test_a_glob_of_folders_alone_is_refused(here: Path) -> None:
    """It would screen nothing, and end as if nothing were flagged."""
    (here / "logs").mkdir()
    with pytest.raises(InputError):
        read_items(["log*"], "prompt")


@pytest.mark.parametrize("argument", ["logs", "logs/"])
def test_a_folder_is_refused_with_a_hint(here: Path, argument: str) -> None:
    (here / "logs").mkdir()
    with pytest.raises(InputError) as caught:
        read_items([argument], "prompt")
    assert (
        str(caught.value)
        == f"{argument} is a folder; name its files, for example {argument.rstrip('/')}/*.txt"
    )


def test_text_takes_every_argument_as_it_is(here: Path) -> None:
    write(here, a_txt="file\n")
    arguments = ("a.txt", "no/such", "*.txt", "-", "", ".")
    assert texts(*arguments, as_text=True) == list(arguments)


def test_an_empty_argument_is_an_empty_text(here: Path) -> None:
    """Not the working folder, which is what `Path("")` stands for."""
    assert texts("") == [""]


# Standard input and what cannot be read


def stdin(monkeypatch: pytest.MonkeyPatch, contents: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(contents)))


def test_a_dash_is_standard_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"a\n\nb\n")
    assert list(read_items(["-"], "prompt")) == [
        Item("-", 1, "a"),
        Item("-", 2, blank=True),
        Item("-", 3, "b"),
    ]


def test_standard_input_is_lines_unless_said_otherwise(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b'{"prompt": "a"}\n')
    assert texts("-") == ['{"prompt": "a"}']
    stdin(monkeypatch, b'{"prompt": "a"}\n')
    assert texts("-", input_format="jsonl") == ["a"]
    stdin(monkeypatch, b"prompt\na\n")
    assert texts("-", input_format="csv") == ["a"]


def test_standard_input_is_read_line_by_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt is there before the second is written."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb", buffering=0) as writer:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=reader))
        lines = read_items(["-"], "prompt")
        writer.write(b"a\n")
        assert next(lines).text == "a"
        writer.write(b"b\n")
        assert next(lines).text == "b"


def test_a_file_named_dash_can_be_reached(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"standard input\n")
    (here / "-").write_text("the file", encoding="utf-8")
    assert texts("./-") == ["the file"]


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")
def test_an_unreadable_file_costs_itself(here: Path) -> None:
    write(here, a_txt="a\n", b_txt="b\n")
    with socket.socket(socket.AF_UNIX) as server:  # it exists, and not even root can open it
        server.bind("s.txt")
        before, unreadable, after = read_items(["a.txt", "s.txt", "b.txt"], "prompt")
    assert (before.text, unreadable.text, after.text) == ("a", None, "b")
    assert unreadable.source == "s.txt"
    assert unreadable.error is not None
    assert unreadable.error.startswith("the file cannot be read: ")


def test_a_file_that_went_away_costs_itself(here: Path) -> None:
    write(here, a_txt="a\n", b_txt="b\n")
    lines = read_items(["a.txt", "b.txt"], "prompt")
    (here / "a.txt").unlink()
    gone, after = lines
    assert gone.error == "the file cannot be read: No such file or directory"
    assert after.text == "b"


def test_nothing_is_read_before_it_is_asked_for(here: Path) -> None:
    write(here, a_txt="old\n")
    lines = read_items(["a.txt"], "prompt")
    write(here, a_txt="new\n")
    assert [item.text for item in lines] == ["new"]
