"""The command line: what is written where, and the exit code that follows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny
import typer
from tiny import BIAS, severity_of
from typer.testing import CliRunner

import lance_edge
from lance_edge import cli
from lance_edge.bundle import file_entry
from lance_edge.report import EXCERPT, excerpt
from lance_edge_engines import SessionError, available_devices

ENTRY = [sys.executable, "-m", "lance_edge"]
SCHEMA = jsonschema.Draft202012Validator(
    json.loads(files("lance_edge").joinpath("verdict.schema.json").read_text())
)

PLACE = ("source", "line", "prompt")  # what a record holds besides the verdict

Invoke = Callable[..., Any]


def invoke(*arguments: str, stdin: bytes | None = None) -> Any:
    """The command in this process; usage errors and ours alike end in an exit code."""
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


@pytest.fixture
def screen(tiny_bundle: Path) -> Invoke:
    """`lance-edge screen` with the tiny bundle."""

    def run(*arguments: str, stdin: bytes | None = None) -> Any:
        return invoke("screen", "--bundle", str(tiny_bundle), *arguments, stdin=stdin)

    return run


def start(
    *arguments: str | bytes | Path, timeout: float = 60, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """The command as users run it, in a process of its own."""
    return subprocess.run([*ENTRY, *arguments], capture_output=True, timeout=timeout, **options)


def records(output: str) -> list[dict[str, Any]]:
    """JSON lines; each verdict is checked against its schema."""
    found = [json.loads(line) for line in output.splitlines()]
    for record in found:
        if "error" not in record:
            SCHEMA.validate({k: v for k, v in record.items() if k not in PLACE})
    return found


# As users run it


@pytest.mark.parametrize(
    ("prompt", "code", "decision"),
    [("hello cake", 0, "allow"), ("bomb", 1, "rewrite"), ("a minor", 1, "block")],
)
def test_the_exit_code_says_whether_something_was_flagged(
    tiny_bundle: Path, prompt: str, code: int, decision: str
) -> None:
    done = start("screen", "--bundle", tiny_bundle, prompt)
    assert done.returncode == code
    assert done.stdout.decode().startswith(f"{decision:<7}  ")
    assert done.stderr == b""


def test_verdicts_go_to_stdout_and_the_rest_to_stderr(tiny_bundle: Path) -> None:
    done = start(
        "screen", "--bundle", tiny_bundle, "-", "--format", "jsonl", input=b"hello\n\xff\n\nbomb\n"
    )
    assert done.returncode == 3
    assert [record["line"] for record in records(done.stdout.decode())] == [1, 2, 4]
    assert done.stderr.decode().splitlines() == [
        "lance-edge: -:2: the line is not valid UTF-8 (byte 1)",
        "lance-edge: 2 screened, 1 not allowed, 1 not screened, 1 blank line skipped",
    ]


def test_a_missing_file_is_wrong_usage(tiny_bundle: Path, tmp_path: Path) -> None:
    done = start("screen", "--bundle", tiny_bundle, "hello", tmp_path / "no.txt")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == (
        f"lance-edge: there is no file {tmp_path / 'no.txt'}; to screen it as a prompt, add --text\n"
    )


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no SIGPIPE on this system")
def test_a_closed_pipe_ends_it_quietly(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("hello bomb\n" * 10_000)  # 900 kB of rows, a pipe holds 64
    with subprocess.Popen(
        [*ENTRY, "screen", "--bundle", tiny_bundle, tmp_path / "many.txt", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"rewrite" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == -signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams as a POSIX shell does")
@pytest.mark.parametrize(
    ("closed", "argument", "code", "said"),
    [
        ("2>&-", "hello", 0, b""),  # 1 would say that it was flagged
        ("2>/dev/full", "hello", 0, b""),
        (
            ">&-",
            "hello",
            3,
            b"lance-edge: standard output is closed, so no result can be written\n",
        ),
        ("<&-", "-", 2, b"lance-edge: standard input is closed; name a file, or give the prompt"),
    ],
)
def test_a_standard_stream_that_is_closed(
    tiny_bundle: Path, closed: str, argument: str, code: int, said: bytes
) -> None:
    if "/dev/full" in closed and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command = [*ENTRY, "screen", "--bundle", str(tiny_bundle), argument, "--format", "jsonl"]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True)
    assert done.returncode == code
    assert done.stderr.startswith(said) and b"Traceback" not in done.stdout + done.stderr
    if code == 0:
        (record,) = records(done.stdout.decode())
        assert record["decision"] == "allow"


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lance_edge", "version"], capture_output=True)
    assert (done.returncode, done.stdout.decode().strip()) == (0, lance_edge.__version__)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SessionError("the device is gone")])
def test_what_was_written_before_an_end_is_whole(
    screen: Invoke, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    judge = lance_edge.Pipeline.judge
    batches = iter([None, stop])

    def until(pipeline: lance_edge.Pipeline, prompts: Any) -> Any:
        if (error := next(batches)) is not None:
            raise error
        return judge(pipeline, prompts)

    monkeypatch.setattr(lance_edge.Pipeline, "judge", until)
    result = screen("hello", "bomb", "--batch", "1", "--format", "json")
    assert result.exit_code == (130 if isinstance(stop, KeyboardInterrupt) else 3)
    assert [record["decision"] for record in json.loads(result.stdout)] == ["allow"]


def test_no_prompt_is_wrong_usage_that_says_what_to_name(screen: Invoke) -> None:
    for command in (("screen",), ("refine",)):
        result = invoke(*command, stdin=b"hello\n")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            "lance-edge: nothing to read; name texts, files or globs, or - for standard input\n"
        )


@pytest.mark.parametrize(
    ("options", "hints"), [((), 1), (("--input", "lines"), 0), (("--quiet",), 0)]
)
def test_lines_that_look_like_json_are_hinted_at(
    screen: Invoke, options: tuple[str, ...], hints: int
) -> None:
    result = screen("-", *options, stdin=b'{"prompt": "hello"}\n{"prompt": "hello"}\n')
    assert result.exit_code == 0
    assert (
        result.stderr.count("-:1 looks like JSON and is read as plain text; --input jsonl") == hints
    )
    assert screen("-", "--input", "jsonl", stdin=b'{"prompt": "hello"}\n').stderr == ""


def test_a_blank_first_line_hides_no_hint(screen: Invoke) -> None:
    stderr = screen("-", stdin=b'\n{"prompt": "hello"}\n').stderr
    assert "-:2 looks like JSON and is read as plain text" in stderr


def test_a_prompt_within_json_that_looks_like_json_is_not_hinted_at(
    screen: Invoke, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": '{"a": 1} hello'}) + "\n", encoding="utf-8")
    assert screen(str(path)).stderr == ""


def test_what_the_policy_allows_ends_with_0(screen: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"actions": {"*": "allow"}}', encoding="utf-8")
    result = screen("bomb", "--policy", str(path), "--format", "jsonl")
    assert result.exit_code == 0
    (record,) = records(result.stdout)
    assert (record["decision"], record["flagged"]) == ("allow", ["violence"])
    path.write_text('{"actions": {"*": "advise"}}', encoding="utf-8")
    assert screen("bomb", "--policy", str(path)).exit_code == 1


def test_the_package_says_what_is_in_it() -> None:
    assert set(lance_edge.__all__) <= set(dir(lance_edge))


def test_a_verdict_is_shown_in_a_line(tiny_bundle: Path) -> None:
    with lance_edge.load(tiny_bundle) as guard:
        shown = repr(guard.screen("bomb"))
    assert shown == "Verdict(decision='rewrite', flagged=('violence',), refined=None)"


def test_an_aborted_question_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def abort(*_: Any) -> None:
        raise typer.Abort

    monkeypatch.setattr(cli, "offer_pull", abort)
    result = invoke("refine", "hello")
    assert (result.exit_code, result.stderr) == (130, "lance-edge: interrupted\n")


def test_a_line_of_10_mb_is_reported_and_the_next_one_screened(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "big.txt").write_bytes(b"bomb " * 2_000_000 + b"\nhello\n")
    done = start(
        "screen", "--bundle", tiny_bundle, tmp_path / "big.txt", "--format", "jsonl", "--quiet"
    )
    assert done.returncode == 3
    big, small = records(done.stdout.decode())
    assert big["error"].startswith(
        "the prompt has 10,000,000 characters and the limit is 1,000,000"
    )
    assert (small["line"], small["decision"]) == (2, "allow")
    assert len(done.stderr) < 300  # it names the line and does not repeat it


@pytest.mark.slow
def test_one_broken_line_among_100_000_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"hello {n}" + " bomb" * (n % 7 == 0)}) for n in range(100_000)]
    lines[49_999] = lines[49_999][:-1]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    done = start(
        *("screen", "--bundle", tiny_bundle, tmp_path / "many.jsonl", "--threads", "1"),
        *("--format", "jsonl", "--with-prompt"),
        timeout=300,  # a minute at most, on a machine that has nothing else to do
    )
    assert done.returncode == 3
    broken, summary = done.stderr.decode().splitlines()
    assert broken.startswith(
        f"lance-edge: {tmp_path / 'many.jsonl'}:50000: the line is not valid JSON"
    )
    flagged = sum(n % 7 == 0 for n in range(100_000) if n != 49_999)
    assert summary == f"lance-edge: 99,999 screened, {flagged:,} not allowed, 1 not screened"
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["line"] for record in found] == list(range(1, 100_001))
    for n, record in enumerate(found):
        if n == 49_999:
            assert "decision" not in record
        else:
            assert record["prompt"] == json.loads(lines[n])["prompt"]
            assert record["flagged"] == ["violence"] * (n % 7 == 0)


@pytest.mark.skipif(sys.platform == "win32", reason="its arguments are always Unicode")
def test_an_argument_in_another_encoding_is_refused(tiny_bundle: Path) -> None:
    done = start("screen", "--bundle", tiny_bundle, b"bomb \xe9")
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"lance-edge: prompt: the prompt has a lone surrogate at position 5" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8:strict"])
def test_the_table_can_be_written_in_any_encoding(tiny_bundle: Path, encoding: str) -> None:
    """Python writes in the code page when Windows redirects to a file."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = start("screen", "--bundle", tiny_bundle, "日本語 bomb", env=environment)
    assert done.stderr == b""
    assert done.returncode == 1
    assert done.stdout.startswith(b"rewrite  violence 0.97")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes any bytes in a file name")
def test_a_file_name_in_another_encoding_can_be_written(tiny_bundle: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_text("bomb\n")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = start("screen", "--bundle", tiny_bundle, path, "--quiet", env=environment)
    assert done.stderr == b""
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_no_bug_of_ours(tiny_bundle: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*ENTRY, "screen", "--bundle", tiny_bundle, "bomb"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.returncode == 3
    assert b"No space left on device" in done.stderr
    assert b"this is a bug" not in done.stderr


# Formats


@pytest.mark.parametrize(
    ("text", "at", "shown"),
    [
        ("a  short\none", 3, "a short one"),
        ("word " * 30 + "end", 0, "word " * 11 + "word…"),
        (
            "word " * 30 + "bomb " + "word " * 30,
            150,
            "…" + "word " * 4 + "bomb " + "word " * 6 + "wor…",
        ),
        ("word " * 30 + "bomb", 150, "…" + "word " * 11 + "bomb"),
        ("word   " * 30 + "bomb", 210, "…" + "word " * 11 + "bomb"),
        ("word " * 11 + "bombs", 55, "word " * 11 + "bombs"),  # 60 characters: all that fit
    ],
)
def test_an_excerpt_of_a_long_text_shows_the_words(text: str, at: int, shown: str) -> None:
    found = excerpt(text, at)
    assert found == shown
    assert len(found) <= EXCERPT


def test_the_table_shows_scores_an_excerpt_and_the_words(screen: Invoke) -> None:
    result = screen("hello   the\nBOMB spy", "cake")
    high, low = severity_of(BIAS + 8.1), severity_of(BIAS - 1)
    row, words, cake = result.stdout.splitlines()
    assert row.startswith(f"rewrite  violence {high:.2f}±")
    assert f", privacy {high:.2f}±" in row
    assert row.endswith("  hello the BOMB spy")
    assert words == "         words: BOMB | spy"
    assert cake.startswith(f"allow    (highest: violence {low:.2f}±")
    assert cake.endswith(")  cake")
    assert result.stderr == "lance-edge: 2 screened, 1 not allowed, 0 not screened\n"


def test_the_table_names_lines_and_shortens_prompts(screen: Invoke) -> None:
    result = screen("-", stdin=b"hello\n" + b"hello " * 50)
    first, second = result.stdout.splitlines()
    assert first.startswith("-:1  allow  ")
    assert second.startswith("-:2  allow  ")
    excerpt = second.split("  ")[-1]
    assert (len(excerpt), excerpt[-1]) == (60, "…")


def test_json_lines_parse_back(screen: Invoke, guard: lance_edge.Pipeline) -> None:
    result = screen("hello", "spy bomb", "--format", "jsonl")
    assert result.exit_code == 1
    for prompt, record in zip(("hello", "spy bomb"), records(result.stdout), strict=True):
        expected = guard.screen(prompt).to_dict()
        assert (record.pop("source"), record.pop("line")) == (None, None)
        assert record.keys() == expected.keys()
        del record["timings"], expected["timings"]
        assert record == expected


def test_json_holds_the_same_records(screen: Invoke) -> None:
    arguments = ("hello", "bomb", " ", "--with-prompt")
    one = json.loads(screen(*arguments, "--format", "json").stdout)
    lines = records(screen(*arguments, "--format", "jsonl").stdout)
    for record in (*one, *lines):
        record.pop("timings", None)
    assert len(one) == 3
    assert one == lines


@pytest.mark.parametrize(
    ("output_format", "written"), [("json", "[]\n"), ("jsonl", ""), ("table", "")]
)
def test_no_prompts_no_records(screen: Invoke, output_format: str, written: str) -> None:
    result = screen("-", "--format", output_format, stdin=b"\n\n")
    assert (result.exit_code, result.stdout) == (0, written)
    assert result.stderr.endswith(
        "0 screened, 0 not allowed, 0 not screened, 2 blank lines skipped\n"
    )


@pytest.mark.parametrize("batch", ["1", "3", "64"])
def test_records_keep_the_order_of_the_input(screen: Invoke, batch: str) -> None:
    words = ["hello", "bomb", "", "spy", "\0", "minor", "cake"] * 4
    stdin = "\n".join(json.dumps(word) for word in words).encode()
    arguments = ("-", "--input", "jsonl", "--format", "jsonl", "--with-prompt", "--batch", batch)
    found = records(screen(*arguments, stdin=stdin).stdout)
    assert [record["line"] for record in found] == list(range(1, 29))
    assert [record["prompt"] for record in found] == words
    decisions = ["allow", "rewrite", None, "rewrite", None, "block", "allow"] * 4
    assert [record.get("decision") for record in found] == decisions


def test_a_prompt_is_in_a_record_only_if_asked(screen: Invoke) -> None:
    silent = screen("zanzibar bomb", "zanzibar\0", "--text", "--format", "jsonl")
    assert "zanzibar" not in silent.output
    asked = screen("zanzibar bomb", "--format", "jsonl", "--with-prompt")
    assert records(asked.stdout)[0]["prompt"] == "zanzibar bomb"


def test_a_csv_file_without_header_is_not_repeated_in_records(screen: Invoke) -> None:
    """Its first row is a prompt, and no record holds one unless --with-prompt asks for it."""
    stdin = b"1,zanzibar bomb\n2,hello\n"
    result = screen("-", "--input", "csv", "--format", "jsonl", stdin=stdin)
    assert result.exit_code == 3
    assert "zanzibar" not in result.stdout


STEERING = "\x1b\x07\x9b\u202e\u200b"  # escape, bell, a one-byte CSI, right-to-left, zero width


def test_a_prompt_cannot_steer_the_terminal(screen: Invoke) -> None:
    result = screen("-", stdin=f"hello {STEERING}[2J bomb {STEERING} bomb\n".encode())
    assert result.exit_code == 1
    row, words = result.stdout.splitlines()
    assert row.endswith("  hello �����[2J bomb ����� bomb")
    assert words == "         words: bomb ����� bomb"


@pytest.mark.parametrize(
    ("input_format", "contents"),
    [
        ("jsonl", json.dumps({STEERING: "hello"})),
        ("csv", f"id,{STEERING}\n1,hello\n"),
    ],
    ids=["jsonl", "csv"],
)
def test_the_names_of_fields_cannot_steer_the_terminal(
    screen: Invoke, input_format: str, contents: str
) -> None:
    result = screen("-", "--input", input_format, stdin=contents.encode())
    assert result.exit_code == 3
    assert "(see --field)" in result.stderr
    assert not set(STEERING) & set(result.output)


@pytest.mark.skipif(sys.platform == "win32", reason="no control characters in its file names")
def test_the_name_of_a_file_cannot_steer_the_terminal(screen: Invoke, tmp_path: Path) -> None:
    (tmp_path / f"a{STEERING}[2J.txt").write_bytes(b"bomb\n\xff\n")
    result = screen(str(tmp_path / "*.txt"))
    assert result.exit_code == 3
    assert "[2J.txt:1" in result.stdout
    assert "[2J.txt:2" in result.stderr
    assert not set(STEERING) & set(result.output)


def test_a_prompt_without_its_quotation_marks_is_hinted_at(screen: Invoke, tmp_path: Path) -> None:
    hint = "4 words are read as 4 prompts; put quotation marks around a prompt of several words"
    words = ("how", "don't", "I", "bake?")
    assert hint in screen(*words).stderr
    for silent in (("--quiet", *words), ("--text", *words), ("how are", "you"), words[:1]):
        assert "quotation marks" not in screen(*silent).stderr
    file = tmp_path / "prompts.txt"
    file.write_text("hello\n")
    assert "quotation marks" not in screen("one", "two", str(file)).stderr


def test_quiet_leaves_only_what_went_wrong(screen: Invoke) -> None:
    result = screen("-", "-q", stdin=b"hello\nbo\0mb\n\n")
    assert result.stderr == (
        "lance-edge: -:2: the prompt has a NUL character at position 2; remove it\n"
    )


def test_one_prompt_needs_no_summary(screen: Invoke) -> None:
    assert screen("bomb").stderr == ""


# Prompts that cannot be screened


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"bo\0mb", "the prompt has a NUL character at position 2"),
        (b"bomb \xff", "the line is not valid UTF-8 (byte 6)"),
        ("\u200b".encode(), "the prompt holds only invisible characters"),
        (b"hello " * 20, "the prompt has 120 characters and the limit is 100"),
    ],
    ids=ascii,
)
def test_a_bad_line_is_named_and_the_others_are_screened(
    screen: Invoke, stdin: bytes, message: str
) -> None:
    result = screen(
        *("-", "--max-chars", "100", "--format", "jsonl"), stdin=b"hello\n" + stdin + b"\ncake\n"
    )
    assert result.exit_code == 3
    assert f"lance-edge: -:2: {message}" in result.stderr
    before, bad, after = records(result.stdout)
    assert bad.keys() == {"source", "line", "error"}
    assert (before["decision"], bad["line"], after["decision"]) == ("allow", 2, "allow")
    assert bad["error"].startswith(message)


def test_lone_surrogates_in_json_are_refused_and_written_back(screen: Invoke) -> None:
    arguments = ("-", "--input", "jsonl", "--format", "jsonl", "--with-prompt")
    stdin = b'{"prompt": "bomb \\ud800"}\n{"prompt": "\\ud83d\\udca3 bomb"}\n'
    result = screen(*arguments, stdin=stdin)
    alone, pair = records(result.stdout)
    assert "lone surrogate at position 5" in alone["error"]
    assert alone["prompt"] == "bomb \ud800"
    assert (pair["prompt"], pair["flagged"]) == ("\U0001f4a3 bomb", ["violence"])


def test_a_lone_surrogate_in_a_key_can_be_reported(screen: Invoke) -> None:
    result = screen("-", "--input", "jsonl", stdin=b'{"\\ud800": "hello"}\n')
    assert result.exit_code == 3
    assert "the object has no field 'prompt'" in result.stderr


@pytest.mark.parametrize("options", [(), ("--text",)], ids=["auto", "text"])
def test_an_empty_argument_cannot_be_screened(screen: Invoke, options: tuple[str, ...]) -> None:
    result = screen("", *options)
    assert result.stderr.startswith("lance-edge: prompt: the prompt is empty")
    assert result.exit_code == 3


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (b"hello\ncake\n", 0),
        (b"hello\nbomb\n", 1),
        (b"hello\n\xff\n", 3),
        (b"bomb\n\xff\n", 3),
        (b"\xff\nbomb\n", 3),
    ],
)
def test_a_line_not_screened_outweighs_one_flagged(screen: Invoke, lines: bytes, code: int) -> None:
    assert screen("-", stdin=lines).exit_code == code


# Options


@pytest.mark.parametrize(
    ("settings", "flagged"),
    [
        ([], ["violence", "privacy"]),
        (["0.99"], []),
        (["0.01"], ["violence", "privacy", "child"]),
        (["violence=0.99"], ["privacy"]),
        (["violence=0.99", "privacy=0.99", "child=0.01"], ["child"]),
        (["violence=0.99", "violence=0.5"], ["violence", "privacy"]),
        (["1"], []),
    ],
    ids=str,
)
def test_thresholds_decide_what_is_flagged(
    screen: Invoke, settings: list[str], flagged: list[str]
) -> None:
    options = [part for setting in settings for part in ("--threshold", setting)]
    result = screen("bomb spy", "--format", "jsonl", *options)
    assert records(result.stdout)[0]["flagged"] == flagged
    assert result.exit_code == (1 if flagged else 0)


def test_one_threshold_for_all_and_another_for_one(screen: Invoke) -> None:
    """`--threshold 0.7 --threshold self_harm=0.3` is in the README."""
    options = ("--threshold", "0.99", "--threshold", "privacy=0.3")
    result = screen("bomb spy", "--format", "jsonl", *options)
    assert result.stderr == ""
    assert records(result.stdout)[0]["flagged"] == ["privacy"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("high", "--threshold high: 'high' is not a number"),
        ("violence=", "--threshold violence=: '' is not a number"),
        ("violence=high", "--threshold violence=high: 'high' is not a number"),
        ("violance=0.5", "the bundle has no category 'violance'; did you mean violence?"),
        ("zzz=0.5", "the bundle has no category 'zzz'; it has violence, privacy, child"),
        ("=0.5", "the bundle has no category ''; it has violence, privacy, child"),
        ("0", "the threshold for all categories must be a number above 0 and at most 1, not 0.0"),
        ("1.5", "must be a number above 0 and at most 1, not 1.5"),
        ("nan", "must be a number above 0 and at most 1, not nan"),
        (
            "violence=-1",
            "the threshold of violence must be a number above 0 and at most 1, not -1.0",
        ),
    ],
)
def test_a_wrong_threshold_is_wrong_usage(screen: Invoke, setting: str, message: str) -> None:
    result = screen("hello", "--threshold", setting)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("lance-edge: ")
    assert message in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("screen", "hello", "--format", "xml"),
        ("screen", "hello", "--input", "parquet"),
        ("screen", "hello", "--batch", "0"),
        ("screen", "hello", "--max-chars", "0"),
        ("screen", "hello", "--threads", "0"),
        ("screen", "hello", "--no-such-option"),
        ("info", "--format", "jsonl"),
        ("verify", "surplus"),
        ("no-such-command",),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def test_a_folder_is_wrong_usage(screen: Invoke, tmp_path: Path) -> None:
    result = screen(str(tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{tmp_path} is a folder; name its files" in result.stderr


def test_files_can_be_csv_with_a_column_of_any_name(screen: Invoke, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"hello\nbomb"\n2,cake\n')
    result = screen(str(tmp_path / "*.csv"), "--field", "text", "--format", "jsonl")
    assert [(r["line"], r["decision"]) for r in records(result.stdout)] == [
        (2, "rewrite"),
        (4, "allow"),
    ]
    assert records(result.stdout)[0]["source"] == str(tmp_path / "a.csv")


def test_text_takes_a_dash_as_a_prompt(screen: Invoke) -> None:
    result = screen("-", "--text", "--format", "jsonl", "--with-prompt", stdin=b"bomb\n")
    assert [record["prompt"] for record in records(result.stdout)] == ["-"]


@pytest.mark.parametrize("command", [("screen", "hello"), ("verify",)], ids=" ".join)
def test_cuda_means_cuda(tiny_bundle: Path, command: tuple[str, ...]) -> None:
    if available_devices()["cuda"] is None:
        pytest.skip("CUDA is available here")
    result = invoke(*command, "--bundle", str(tiny_bundle), "--device", "cuda")
    assert (result.exit_code, result.stdout) == (3, "")
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("lance-edge: ")
    assert "has no CUDAExecutionProvider; install `lance-edge[gpu]`" in sentence


def test_an_unknown_device_is_wrong_usage(screen: Invoke) -> None:
    """Unlike a device that is missing here, it is missing everywhere."""
    result = screen("hello", "--device", "tpu")
    assert "there is no device 'tpu'; choose from auto, cpu, cuda" in result.stderr
    assert result.exit_code == 2


# Bundles


@pytest.mark.parametrize("command", [("screen", "hello"), ("info",), ("verify",)], ids=" ".join)
def test_a_missing_bundle_is_a_sentence(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = invoke(*command, "--bundle", str(tmp_path))
    assert (result.exit_code, result.stdout) == (3, "")
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith(f"lance-edge: {tmp_path / 'manifest.json'} is missing; ")


def with_goldens(folder: Path, goldens: object) -> str:
    """The tiny bundle with other goldens; all hashes agree."""
    tiny.write_bundle(folder)
    contents = json.dumps(goldens).encode()
    (folder / "goldens.json").write_bytes(contents)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["goldens.json"] = asdict(file_entry(contents))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def golden(prompt: str, decision: str, **severity: float) -> dict[str, object]:
    return {"prompt": prompt, "decision": decision, "severity": severity}


def test_verify_says_what_agrees(tiny_bundle: Path) -> None:
    result = invoke("verify", "--bundle", str(tiny_bundle), "--device", "cpu")
    assert (result.exit_code, result.stderr) == (0, "")
    hashes, goldens = result.stdout.splitlines()
    assert hashes == "hashes   5 files agree with the manifest"
    assert goldens.startswith("goldens  2 prompts on cpu: severities differ by at most ")
    assert goldens.endswith(" (allowed 1e-05), 0 decisions differ")


@pytest.mark.parametrize(
    ("severity", "decision", "said"),
    [
        (severity_of(BIAS + 8) - 0.25, "rewrite", "2.50e-01 (allowed 1e-05), 0 decisions differ"),
        (severity_of(BIAS + 8), "allow", "(allowed 1e-05), 1 decisions differ"),
    ],
    ids=["severity", "decision"],
)
def test_verify_fails_if_the_goldens_differ(
    tmp_path: Path, severity: float, decision: str, said: str
) -> None:
    goldens = [
        golden("minor", "block", child=severity_of(BIAS + 9)),
        golden("bomb", decision, violence=severity),
    ]
    result = invoke("verify", "--bundle", with_goldens(tmp_path / "other", goldens))
    assert said in result.stdout
    assert result.exit_code == 3
    assert "do not rely on its verdicts" in result.stderr


def test_goldens_that_are_no_numbers_agree_with_nothing(tmp_path: Path) -> None:
    goldens = [
        golden("minor", "block", child=severity_of(BIAS + 9)),
        golden("bomb", "rewrite", violence=float("nan")),
    ]
    result = invoke("verify", "--bundle", with_goldens(tmp_path / "other", goldens))
    assert result.exit_code == 3


@pytest.mark.parametrize(
    "goldens",
    [[], {}, [golden("bomb", "rewrite", arson=0.5)], [{"prompt": "bomb"}], [golden("", "allow")]],
    ids=["none", "object", "category", "incomplete", "empty"],
)
def test_unusable_goldens_are_the_bundles_fault(tmp_path: Path, goldens: object) -> None:
    result = invoke("verify", "--bundle", with_goldens(tmp_path / "other", goldens))
    assert result.exit_code == 3
    assert "this is a bug" not in result.stderr
    assert "goldens.json" in result.stderr


def test_verify_names_a_damaged_file(tmp_path: Path) -> None:
    folder = tiny.write_bundle(tmp_path / "own")
    (folder / "goldens.json").write_bytes(b"[]")
    result = invoke("verify", "--bundle", str(folder))
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith(f"lance-edge: {folder / 'goldens.json'} has 2 bytes")


@pytest.fixture
def broken_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bundle that makes no number of the word cake, as an overflow in fp16 would."""
    monkeypatch.setitem(tiny.WORDS, "cake", (float("nan"),) * 3)
    goldens = [
        golden("hello", "allow", violence=severity_of(BIAS)),
        golden("cake", "allow", child=0.0),
    ]
    return with_goldens(tmp_path / "broken", goldens)


def test_a_severity_that_is_no_number_is_not_allowed(broken_numbers: str) -> None:
    """It is below every threshold, and NaN is no JSON."""
    result = invoke("screen", "cake", "--bundle", broken_numbers, "--format", "jsonl")
    assert result.exit_code == 3
    assert "NaN" not in result.stdout


def test_verify_fails_if_a_severity_is_no_number(broken_numbers: str) -> None:
    assert invoke("verify", "--bundle", broken_numbers).exit_code == 3


def test_info_shows_the_bundle_and_the_devices(
    tiny_bundle: Path, guard: lance_edge.Pipeline
) -> None:
    result = invoke("info", "--bundle", str(tiny_bundle))
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:10] == [
        f"lance-edge  {lance_edge.__version__}",
        f"bundle      tiny 1, fp32, {tiny_bundle}",
        f"sha256      {guard.bundle.sha256}",
        "refiner     none in this bundle",
        "windows     16 tokens, 4 shared by neighbours",
        "",
        "category  threshold  action   mlcommons",
        "violence      0.500  rewrite  S1",
        "privacy       0.500  rewrite  S1",
        "child         0.500  block    S1",
    ]
    assert lines[11] == "device cpu   offered by the installed runtime"
    assert lines[12].startswith("device cuda  ")


def test_info_as_json_holds_the_same(tiny_bundle: Path) -> None:
    result = invoke("info", "--bundle", str(tiny_bundle), "--format", "json")
    values = json.loads(result.stdout)
    assert values["version"] == lance_edge.__version__
    assert values["bundle"] == {"path": str(tiny_bundle), "name": "tiny", "version": "1"}
    assert (values["precision"], values["window"]) == ("fp32", 16)
    assert values["categories"][2] == {
        "name": "child",
        "title": "Child",
        "action": "block",
        "mlcommons": ["S1"],
        "openai": [],
        "threshold": 0.5,
    }
    assert values["devices"] == available_devices()


def test_version_is_the_packages() -> None:
    for asked in ("version", "--version"):
        assert invoke(asked).stdout == f"{lance_edge.__version__}\n"


# What nobody expects


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ZeroDivisionError("surprise"), 3, "this is a bug; please report it"),
        (SessionError("the graph failed on cpu"), 3, "lance-edge: the graph failed on cpu\n"),
        (KeyboardInterrupt(), 130, "lance-edge: interrupted\n"),
    ],
    ids=["bug", "session", "interrupt"],
)
def test_no_error_looks_like_a_flagged_prompt(
    screen: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(lance_edge.Pipeline, "judge", fail)
    result = screen("bomb")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


def test_a_bug_is_shown_with_its_traceback(screen: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(cli, "load", fail)
    result = screen("bomb")
    assert result.exit_code == 3
    assert result.stderr.startswith("Traceback")
    assert "ZeroDivisionError: surprise" in result.stderr


def test_an_interrupt_while_the_command_is_loading_is_one_line() -> None:
    code = (
        "import builtins, sys\n"
        "from lance_edge.__main__ import main\n"
        "real = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'lance_edge.pipeline': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "lance-edge: interrupted\n")


# the export toolchain's commands


def test_the_toolchain_is_imported_only_when_it_is_called_for() -> None:
    code = "import sys, lance_edge.cli; sys.exit('lance_edge_export' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    listed = start("export", "--help")
    assert listed.returncode == 0
    assert b"screener" in listed.stdout
    code = (
        "import sys; sys.argv = ['lance-edge', 'export', '--help']\n"
        "from lance_edge.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(str(sorted({'torch', 'onnx', 'transformers'} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr == "[]"


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("torch", ("export", "screener", "--checkpoint", ".", "--prompts", "p.jsonl"), "export"),
        ("onnx", ("plan", "--runtime", "rtx"), "rtx"),
        ("ml_dtypes", ("plan", "--runtime", "tensorrt"), "tensorrt"),
    ],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, missing: str, command: tuple[str, ...], extra: str
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        f"sys.argv = ['lance-edge', *{command!r}, '--out', {str(tmp_path / 'out')!r}]\n"
        "from lance_edge.cli import main\n"
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 3
    assert result.stderr == (
        f"lance-edge: {missing} is not installed; install `lance-edge[{extra}]`\n"
    )
