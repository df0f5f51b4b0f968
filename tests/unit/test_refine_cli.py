"""Refining from the command line and through the API, with a network that writes at random.

What it writes is worth nothing, so where a rewrite matters `Scripted` writes in its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import numpy as np
import pytest
import tiny_refiner
from tiny import BIAS, severity_of
from tiny_refiner import PROMPT_TOKENS, SHARE
from typer.testing import CliRunner

import lance_edge
import lance_edge.pipeline
from lance_edge import cli
from lance_edge.bundle import open_bundle
from lance_edge.cache import weights_path
from lance_edge.decoder import Decoder
from lance_edge.pull import pull
from lance_edge.refiner import Reading, Refiner, Rewrite
from lance_edge.screener import logit, sigmoid, spread_of
from lance_edge.verdict import Verdict
from lance_edge_engines import SessionError

SCHEMA = jsonschema.Draft202012Validator(
    json.loads(files("lance_edge").joinpath("verdict.schema.json").read_text())
)
PLACE = ("source", "line", "prompt")  # what a record holds besides the verdict

FLAGGED = "hello the bomb"
OPEN = "kill safely"  # the first look is not sure of it
BLOCKED = "the minor"
STILL_FLAGGED = [f"{word} {n}" for n in range(3) for word in ("bomb", "kill", "spy")]
VIOLENCE = 'violence (extreme) in "bomb": no violence'


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache into which the tiny refiner was pulled."""
    return tmp_path_factory.mktemp("caches") / "pulled"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, caches: Path) -> Path:
    """The tiny bundle with a refiner that was pulled into `caches`; tests must not change it."""
    folder = tiny_refiner.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANCE_EDGE_CACHE", str(caches))
        pull(open_bundle(folder), tiny_refiner.write_wheel(folder.parent))
    return folder


@pytest.fixture(autouse=True)
def pulled(monkeypatch: pytest.MonkeyPatch, bundle: Path, caches: Path) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(caches))


@pytest.fixture
def not_pulled(pulled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; returns its folder."""
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "empty"))
    return tmp_path / "empty"


def load(bundle: Path, **options: Any) -> lance_edge.Pipeline:
    return lance_edge.load(bundle, "cpu", threads=1, **options)


@pytest.fixture
def guard(bundle: Path) -> Iterator[lance_edge.Pipeline]:
    """A pipeline whose first look alone decides."""
    with load(bundle, looks="1") as pipeline:
        yield pipeline


class Scripted:
    """Rewrites in the network's place, one after the other; the last one is repeated.

    seen  (tokens of the prompt that was read, critique) of each rewrite
    """

    def __init__(self, *texts: str, ended: bool = True) -> None:
        self.texts, self.ended = list(texts), ended
        self.seen: list[tuple[str, str]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Scripted:
        def rewrite(refiner: Refiner, reading: Reading, critique: str) -> Rewrite:
            self.seen.append((refiner.tokenizer.decode(list(reading.prompt)), critique))
            text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
            ids = tuple(refiner.tokenizer.encode(text))
            return Rewrite(ids, text, self.ended, -1.0, 3, len(ids) + 1, len(ids), 0.5)

        monkeypatch.setattr(Refiner, "rewrite", rewrite)
        return self


Invoke = Callable[..., Any]


def invoke(*arguments: str, stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


@pytest.fixture
def refine(bundle: Path) -> Invoke:
    """`lance-edge refine` with the tiny bundle."""

    def run(*arguments: str, stdin: bytes | None = None) -> Any:
        options = ("--bundle", str(bundle), "--device", "cpu", "--threads", "1")
        return invoke("refine", *options, *arguments, stdin=stdin)

    return run


def records(output: str) -> list[dict[str, Any]]:
    """JSON lines; each verdict is checked against its schema."""
    found = [json.loads(line) for line in output.splitlines()]
    for record in found:
        if "error" not in record:
            SCHEMA.validate({k: v for k, v in record.items() if k not in PLACE})
    return found


def timeless(verdict: Verdict) -> dict[str, Any]:
    values = verdict.to_dict()
    del values["timings"]
    return values


# pull


def test_pull_prints_where_the_weights_are(bundle: Path, not_pulled: Path, tmp_path: Path) -> None:
    base = str(tiny_refiner.write_wheel(tmp_path))
    first = invoke("pull", "--bundle", str(bundle), "--base", base)
    (path,) = not_pulled.iterdir()
    assert (first.exit_code, first.stdout) == (0, f"{path}\n")
    assert first.stderr.splitlines() == ["checking the base weights", "merging and quantising"]
    again = invoke("pull", "--bundle", str(bundle), "--base", base)
    assert (again.exit_code, again.stdout, again.stderr) == (0, f"{path}\n", "")


def test_a_quiet_pull_prints_the_path_alone(bundle: Path, not_pulled: Path, tmp_path: Path) -> None:
    base = str(tiny_refiner.write_base(tmp_path))
    result = invoke("pull", "--bundle", str(bundle), "--base", base, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert Path(result.stdout.strip()).parent == not_pulled


def test_a_failed_pull_is_a_sentence(bundle: Path, not_pulled: Path, tmp_path: Path) -> None:
    result = invoke("pull", "--bundle", str(bundle), "--base", str(tmp_path / "no.whl"), "-q")
    assert (result.exit_code, result.stdout) == (3, "")
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith(f"lance-edge: {tmp_path / 'no.whl'} is no file")
    assert not not_pulled.exists()


def test_a_bundle_without_a_refiner_has_nothing_to_pull(tiny_bundle: Path) -> None:
    result = invoke("pull", "--bundle", str(tiny_bundle))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "has no refiner, so there is nothing to pull" in result.stderr


def test_verify_is_the_same_before_and_after_the_pull(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goldens are what the screener says, also of a prompt that it leaves open."""
    golden = {
        "prompt": OPEN,
        "decision": "allow",
        "severity": {"violence": severity_of(BIAS + 6 - 3)},
    }
    goldens = {"goldens.json": json.dumps([golden]).encode()}
    folder = tiny_refiner.write_bundle(tmp_path / "own", replaced=goldens)
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "own cache"))
    before = invoke("verify", "--bundle", str(folder), "--device", "cpu")
    path = pull(open_bundle(folder), tiny_refiner.write_wheel(tmp_path))
    after = invoke("verify", "--bundle", str(folder), "--device", "cpu")
    assert (before.exit_code, after.exit_code) == (0, 0)
    assert before.stdout.splitlines()[-1] == after.stdout.splitlines()[-1]
    path.write_bytes(path.read_bytes()[:-1])
    damaged = invoke("verify", "--bundle", str(folder), "--device", "cpu")
    assert damaged.exit_code == 3
    assert str(path) in damaged.stderr


# Without a refiner


def test_refine_before_pull_says_what_to_do(refine: Invoke, not_pulled: Path) -> None:
    result = refine("hello")
    assert (result.exit_code, result.stdout) == (3, "")
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("lance-edge: the refiner's weights are not on this machine")
    assert "`lance-edge pull`" in sentence


@pytest.mark.parametrize("command", ["screen", "refine"])
def test_a_second_look_before_pull_says_what_to_do(
    bundle: Path, not_pulled: Path, command: str
) -> None:
    result = invoke(command, "hello", "--bundle", str(bundle), "--looks", "2")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "`lance-edge pull`" in result.stderr


@pytest.mark.parametrize("looks", ["1", "auto"])
def test_screening_needs_no_pull(bundle: Path, not_pulled: Path, looks: str) -> None:
    result = invoke("screen", OPEN, "--bundle", str(bundle), "--looks", looks, "--format", "jsonl")
    assert result.exit_code == 0
    assert records(result.stdout)[0]["look"] == 1


@pytest.mark.parametrize("arguments", [("refine", "hello"), ("screen", "hello", "--looks", "2")])
def test_a_bundle_without_a_refiner_says_so(tiny_bundle: Path, arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments, "--bundle", str(tiny_bundle))
    assert (result.exit_code, result.stdout) == (3, "")
    assert "the bundle tiny has no refiner: it can screen prompts" in result.stderr


def test_damaged_weights_are_refused(
    refine: Invoke, bundle: Path, not_pulled: Path, tmp_path: Path
) -> None:
    path = pull(open_bundle(bundle), tiny_refiner.write_wheel(tmp_path))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = refine("hello")
    assert (result.exit_code, result.stdout) == (3, "")
    assert str(path) in result.stderr


def test_the_refiner_is_opened_when_it_is_needed(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    real = lance_edge.pipeline.open_refiner

    def count(*arguments: Any) -> Refiner:
        opened.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(lance_edge.pipeline, "open_refiner", count)
    with load(bundle) as pipeline:
        pipeline.screen_many(["hello", FLAGGED])
        assert not opened
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(pipeline.refine, ["hello"] * 8))
        assert len(opened) == 1


# What needs no rewrite


@pytest.mark.parametrize("prompt", ["hello cake", "  hello\n\tthe   cake ", "日本語 hello"])
def test_harmless_text_comes_back_as_it_is(refine: Invoke, prompt: str) -> None:
    result = refine(prompt, "--text", "--format", "jsonl", "--with-prompt", "--looks", "1")
    (record,) = records(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (record["decision"], record["refined"], record["reason"]) == ("allow", None, None)
    assert record["prompt"] == prompt
    assert (record["steps"], record["diff"], record["critique"]) == ([], [], None)


def test_a_harmless_row_is_that_of_screen(refine: Invoke, bundle: Path) -> None:
    screened = invoke("screen", "hello cake", "--bundle", str(bundle), "--looks", "1")
    assert refine("hello cake", "--looks", "1").stdout == screened.stdout


def fail(*_: object, **__: object) -> NoReturn:
    raise AssertionError("the decoder was called")


@pytest.mark.parametrize("prompt", [BLOCKED, "bomb minor", "hello"])
def test_what_is_blocked_or_allowed_is_never_rewritten(
    guard: lance_edge.Pipeline, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    monkeypatch.setattr(Decoder, "step", fail)
    monkeypatch.setattr(Decoder, "start", fail)
    assert timeless(guard.refine(prompt)) == timeless(guard.screen(prompt))
    assert guard.refine(prompt).decision == ("allow" if prompt == "hello" else "block")


@pytest.mark.parametrize("action", ["advise", "review", "block", "allow"])
def test_only_the_action_rewrite_rewrites(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    monkeypatch.setattr(Decoder, "step", fail)
    with load(bundle, looks="1", rules={"actions": {"violence": action}}) as pipeline:
        verdict = pipeline.refine(FLAGGED)
    assert (verdict.decision, verdict.flagged, verdict.refined) == (action, ("violence",), None)


@pytest.mark.parametrize(
    ("action", "accepted"), [("advise", True), ("allow", True), ("review", False)]
)
def test_what_the_policy_lets_pass_vetoes_no_rewrite(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, action: str, accepted: bool
) -> None:
    script = Scripted("hello the spy", "hello the spy").install(monkeypatch)
    rules = {"actions": {"privacy": action}, "max_steps": 1}
    with load(bundle, looks="1", rules=rules) as pipeline:
        verdict = pipeline.refine(FLAGGED)
        assert (verdict.refined is not None) == accepted
        assert script.seen[0] == (FLAGGED, VIOLENCE)
        if accepted:  # nor is the refiner told of it
            pipeline.refine("hello the bomb spy")
            assert "spy" not in script.seen[1][1]


# Rewrites


def test_an_accepted_rewrite_is_in_the_verdict(
    guard: lance_edge.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Scripted("hello the cake").install(monkeypatch)
    verdict = guard.refine(FLAGGED)
    assert script.seen == [(FLAGGED, VIOLENCE)]
    assert (verdict.decision, verdict.refined, verdict.reason) == (
        "rewrite",
        "hello the cake",
        None,
    )
    assert verdict.flagged == ("violence",)  # the prompt's, as the severities are
    assert verdict.critique == VIOLENCE
    (step,) = verdict.steps
    assert (step.text, step.problem, step.flagged) == ("hello the cake", None, ())
    assert [(edit.kind, edit.text) for edit in verdict.diff] == [
        ("keep", "hello the "),
        ("delete", "bomb"),
        ("insert", "cake"),
    ]
    assert verdict.timings.refine_ms > 0
    screened = timeless(guard.screen(FLAGGED))
    changed = ("refined", "critique", "steps", "diff")
    assert {k: v for k, v in timeless(verdict).items() if k not in changed} == {
        k: v for k, v in screened.items() if k not in changed
    }


def test_what_is_left_is_told_in_the_next_step(
    guard: lance_edge.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Scripted("the spy cake", "the cake").install(monkeypatch)
    verdict = guard.refine("the bomb cake")
    assert [prompt for prompt, _ in script.seen] == ["the bomb cake", "the spy cake"]
    assert script.seen[1][1] == 'privacy (extreme) in "spy": no privacy'
    assert (verdict.refined, verdict.decision) == ("the cake", "rewrite")
    assert [step.flagged for step in verdict.steps] == [("privacy",), ()]
    assert "".join(edit.text for edit in verdict.diff if edit.kind != "insert") == "the bomb cake"


@pytest.mark.parametrize(
    ("text", "ended", "reason"),
    [
        (" ", True, "it is empty"),
        ("\u200b", True, "it is empty"),
        ("the cake", False, "it is too long"),
        ("the <|im_end|> cake", True, "it carries tokens of the prompt template"),
        (FLAGGED, True, "it changes nothing"),
        (f" {FLAGGED}\n", True, "it changes nothing"),
        ("the bomb", True, "it is still flagged for violence"),
        ("the minor", True, "it is still flagged for child"),
    ],
)
def test_what_is_not_accepted_is_blocked_with_the_reason(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, text: str, ended: bool, reason: str
) -> None:
    Scripted(text, ended=ended).install(monkeypatch)
    with load(bundle, looks="1", rules={"max_steps": 1}) as pipeline:
        verdict = pipeline.refine(FLAGGED)
    assert (verdict.decision, verdict.refined, verdict.diff) == ("block", None, ())
    assert verdict.reason == f"the rewrite was not accepted: {reason}"
    assert verdict.steps[-1].problem == reason


@pytest.mark.parametrize(
    "text", ["the\0 cake", " ".join(f"cake{n}" for n in range(50))], ids=["NUL", "too long"]
)
def test_a_rewrite_that_cannot_be_screened_is_not_accepted(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """It is the rewrite that is at fault, not the prompt."""
    Scripted(text).install(monkeypatch)
    with load(bundle, looks="1", max_chars=100) as pipeline:
        verdicts = pipeline.refine_many([FLAGGED, "hello"])
    assert [verdict.decision for verdict in verdicts] == ["block", "allow"]
    assert (verdicts[0].reason or "").startswith("the rewrite was not accepted: ")


def test_a_rewrite_longer_than_the_refiner_reads_ends_the_loop(
    guard: lance_edge.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewrite may be half as long again as its prompt, so it may not fit a second time."""
    long = " ".join(["bomb", *(f"word{n}" for n in range(20))])
    assert not guard.refiner.fits(long)
    script = Scripted(long).install(monkeypatch)
    verdict = guard.refine(FLAGGED)
    assert (verdict.decision, len(script.seen)) == ("block", 1)
    assert (verdict.reason or "").startswith("the rewrite was not accepted: ")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_max_steps_rewrites_are_tried(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    Scripted(*STILL_FLAGGED).install(monkeypatch)
    result = refine(FLAGGED, "--looks", "1", "--format", "jsonl", "--max-steps", str(steps))
    (record,) = records(result.stdout)
    assert (result.exit_code, record["decision"], len(record["steps"])) == (1, "block", steps)


def test_three_rewrites_are_tried_unless_a_policy_says_otherwise(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Scripted(*STILL_FLAGGED).install(monkeypatch)
    arguments = [FLAGGED, "--looks", "1", "--format", "jsonl"]
    assert len(records(refine(*arguments).stdout)[0]["steps"]) == 3
    (tmp_path / "policy.json").write_text('{"max_steps": 4}')
    arguments += ["--policy", str(tmp_path / "policy.json")]
    assert len(records(refine(*arguments).stdout)[0]["steps"]) == 4
    assert len(records(refine(*arguments, "--max-steps", "2").stdout)[0]["steps"]) == 2


def test_the_network_itself_gives_a_verdict_by_the_rules(guard: lance_edge.Pipeline) -> None:
    prompts = [FLAGGED, "spy " * 10, "the bomb 日本語 \N{GRINNING FACE}"]
    for prompt, verdict in zip(prompts, guard.refine_many(prompts), strict=True):
        SCHEMA.validate(json.loads(json.dumps(verdict.to_dict())))
        assert verdict.decision == ("block" if verdict.refined is None else "rewrite")
        assert (verdict.refined is None) == (verdict.reason is not None)
        assert 1 <= len(verdict.steps) <= 3
        for step in verdict.steps:
            assert 0 <= step.accepted <= step.drafted
            assert 1 <= step.decode_steps <= step.tokens + 1
        assert verdict.flagged == guard.screen(prompt).flagged


@pytest.mark.parametrize(
    ("prompt", "known", "total"),
    [("bomb xx yy zz", 1, 4), ("bomb \u043a\u0430\u043a \u70b8\u5f39", 1, 3)],
)
def test_a_prompt_in_another_language_is_not_rewritten(
    guard: lance_edge.Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    known: int,
    total: int,
) -> None:
    monkeypatch.setattr(guard.refiner, "least_known", 0.55)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", fail)
        verdict = guard.refine(prompt)
    assert (verdict.decision, verdict.refined) == ("block", None)
    assert verdict.reason is not None
    assert verdict.reason.endswith(f"of its {total} words {known} are known")
    for other in ("bomb xx", "bomb the hello zz", "bomb 1 2 3 ( ) 4"):
        assert guard.refine(other).steps


@pytest.mark.parametrize(
    ("bundle_says", "rules", "steps", "sure"),
    [
        (None, {}, 1, True),
        (-0.9, {}, 2, False),
        (-1.1, {}, 1, True),
        (-0.9, {"least_log_probability": -1.5}, 1, True),
        (-0.9, {"least_log_probability": None}, 1, True),
        (None, {"least_log_probability": -0.5}, 2, False),
    ],
)
def test_how_sure_the_refiner_must_be_is_the_bundles_or_the_policys(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bundle_says: float | None,
    rules: dict[str, Any],
    steps: int,
    sure: bool,
) -> None:
    """The scripted rewrites have a log-probability of -1."""
    refiner = {"least_log_probability": bundle_says}
    folder = tiny_refiner.write_bundle(tmp_path / "own", refiner=refiner)
    with load(folder, looks="1", rules=rules) as pipeline:
        script = Scripted("hello the cake").install(monkeypatch)
        verdict = pipeline.refine(FLAGGED)
    assert len(verdict.steps) == steps
    assert [text for text, _ in script.seen] == [FLAGGED] * steps
    assert (verdict.refined is not None) == sure
    assert ("unsure of it" in (verdict.reason or "")) != sure


@pytest.mark.parametrize(
    ("setting", "prompt", "decision"),
    [
        ("review", "hello xx yy zz", "review"),
        ("review", "bomb xx yy zz", "review"),
        ("block", "bomb xx yy zz", "block"),
        ("read", "hello xx yy zz", "allow"),
        ("review", "hello xx", "allow"),
        ("review", "hello the cake zz", "allow"),
    ],
)
def test_the_policy_says_what_becomes_of_other_languages(
    tmp_path: Path, setting: str, prompt: str, decision: str
) -> None:
    folder = tiny_refiner.write_bundle(tmp_path / "own", refiner={"least_known": 0.55})
    with load(folder, looks="1", rules={"other_language": setting}) as pipeline:
        verdict = pipeline.screen(prompt)
    assert verdict.decision == decision
    assert verdict.flagged == (("violence",) if "bomb" in prompt else ())
    if decision == "allow":
        assert verdict.reason is None
    else:
        assert verdict.reason is not None
        assert "a language that the screener knows: of its 4 words 1 are known" in verdict.reason


def test_a_prompt_longer_than_the_refiner_reads_is_not_rewritten(
    guard: lance_edge.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "step", fail)
    longest = "bomb".ljust(PROMPT_TOKENS, "x")
    assert guard.refiner.fits(longest)
    verdict = guard.refine(longest.replace("bomb", "bomb "))
    assert (verdict.decision, verdict.refined) == ("block", None)
    assert verdict.reason == (
        f"the refiner reads {PROMPT_TOKENS} tokens and the prompt has {PROMPT_TOKENS + 1}"
    )


@pytest.mark.parametrize("looks", ["1", "2"])
def test_the_longest_prompt_that_a_bundle_may_allow_is_read(
    tmp_path: Path, bundle: Path, looks: Any
) -> None:
    tokens = (tiny_refiner.CONTEXT - 400) * 2 // 5
    folder = tiny_refiner.write_bundle(tmp_path / "own", refiner={"prompt_tokens": tokens})
    words = [f"{word} " for word in ("bomb", "kill", "spy")]
    longest = "".join(words).ljust(tokens, "x")
    with load(folder, looks=looks, rules={"max_steps": 1}) as pipeline:
        assert pipeline.refiner.tokenizer.count(longest) == tokens
        (step,) = pipeline.refine(longest).steps
    assert step.tokens > 0


@pytest.mark.parametrize(
    "direction", ["turn to safety " * 20, "\N{GRINNING FACE}" * 100], ids=["long", "many bytes"]
)
def test_a_critique_that_no_refiner_can_read_is_the_bundles_fault(
    tmp_path: Path, bundle: Path, direction: str
) -> None:
    gradients = json.loads(tiny_refiner.files()["gradients.json"])
    gradients["categories"]["violence"]["direction"] = direction
    folder = tiny_refiner.write_bundle(
        tmp_path / "own", replaced={"gradients.json": json.dumps(gradients).encode()}
    )
    with pytest.raises(lance_edge.BundleError), load(folder, looks="1") as pipeline:
        pipeline.refine(FLAGGED)


# Formats


def test_the_table_shows_the_rewrite_and_the_changes(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted("hello the cake").install(monkeypatch)
    result = refine(FLAGGED, "hello", "--looks", "1")
    row, *lines, harmless = result.stdout.splitlines()
    assert row.startswith(f"rewrite  violence {severity_of(BIAS + 8.1):.2f}±")
    assert row.endswith(f"  {FLAGGED}")
    assert lines == [
        "         words: bomb",
        "         rewrite: hello the cake",
        "         changes: hello the [-bomb-]{+cake+}",
    ]
    assert harmless.startswith("allow  ")
    assert result.exit_code == 1
    assert result.stderr == "lance-edge: 2 screened, 1 not allowed, 0 not screened\n"


def test_of_long_stretches_that_stay_the_table_shows_the_ends(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted("the cake!").install(monkeypatch)
    before, behind = "hello now. " * 20, " hello again" * 20
    result = refine(f"{before}the bomb!{behind}", "--looks", "1")
    rewrite, changes = result.stdout.splitlines()[-2:]
    assert rewrite == f"         rewrite: {before}the cake!{behind}"
    kept = "hello now. hello now. "
    assert changes.startswith(f"         changes: {kept}")
    assert " … " in changes
    assert "now. the [-bomb-]{+cake+}! hello again" in changes
    assert len(changes) < 400 < len(before + behind)


def test_explain_shows_the_gradients(refine: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted("hello the cake").install(monkeypatch)
    line = f"         - {VIOLENCE}"
    assert line not in refine(FLAGGED, "--looks", "1").stdout.splitlines()
    assert line in refine(FLAGGED, "--looks", "1", "--explain").stdout.splitlines()


def test_the_table_says_why_there_is_no_rewrite(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(" ").install(monkeypatch)
    row, words, because, gradient = refine(FLAGGED, "--looks", "1").stdout.splitlines()
    assert row.startswith("block  ")
    assert words == "         words: bomb"
    assert because == "         because the rewrite was not accepted: it is empty"
    assert gradient.startswith("         - violence (extreme)")


STEERING = "\x1b\x07\x9b\u202e\u200b\r"


def test_a_rewrite_cannot_steer_the_terminal(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(f"the {STEERING}[2J cake\nmore").install(monkeypatch)
    result = refine(FLAGGED, "--looks", "1", "--explain")
    assert not set(STEERING) & set(result.stdout)
    assert "rewrite: the " in result.stdout
    assert len(result.stdout.splitlines()) == 5


def test_what_is_judged_is_written_before_the_rest_of_its_batch(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten: list[str] = []

    def rewrite(refiner: Refiner, reading: Reading, critique: str) -> Rewrite:
        if rewritten:
            raise KeyboardInterrupt
        rewritten.append(critique)
        return Rewrite((1,), "the cake", True, -1.0, 1, 0, 0, 0.5)

    monkeypatch.setattr(Refiner, "rewrite", rewrite)
    result = refine(FLAGGED, "hello", FLAGGED, "hello", "--looks", "1", "--format", "jsonl")
    assert [record["decision"] for record in records(result.stdout)] == ["rewrite", "allow"]
    assert (result.exit_code, result.stderr) == (
        130,
        "lance-edge: ended early: 2 screened, 1 not allowed, 0 not screened\n"
        "lance-edge: interrupted\n",
    )


def test_json_lines_are_what_the_api_says(
    refine: Invoke, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [FLAGGED, "hello", BLOCKED, "spy"]
    Scripted("the cake").install(monkeypatch)
    result = refine(*prompts, "--format", "jsonl")
    with load(bundle) as pipeline:
        expected = [timeless(verdict) for verdict in pipeline.refine_many(prompts)]
    for record, values in zip(records(result.stdout), expected, strict=True):
        assert (record.pop("source"), record.pop("line")) == (None, None)
        del record["timings"]
        assert record == json.loads(json.dumps(values))
    assert [values["decision"] for values in expected] == ["rewrite", "allow", "block", "rewrite"]


def test_json_holds_the_same_records(refine: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted("the cake").install(monkeypatch)
    one = json.loads(refine(FLAGGED, "hello", "", "--format", "json").stdout)
    lines = records(refine(FLAGGED, "hello", "", "--format", "jsonl").stdout)
    for record in (*one, *lines):
        record.pop("timings", None)
    assert len(one) == 3
    assert one == lines
    assert one[0]["refined"] == "the cake"


@pytest.mark.parametrize("batch", ["1", "3", "16"])
def test_bad_lines_are_reported_and_the_others_refined(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: str
) -> None:
    Scripted("the cake").install(monkeypatch)
    lines = [
        b'{"prompt": "the bomb"}',
        b'{"prompt": "hello"',
        b'{"text": "hello"}',
        b"\xff",
        b'{"prompt": ""}',
        b'{"prompt": "hello"}',
        b"",
        b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "spy"}',
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines))
    result = refine(str(path), "--format", "jsonl", "--looks", "1", "--batch", batch)
    found = records(result.stdout)
    assert result.exit_code == 3
    assert {record["line"]: record.get("refined", "error") for record in found} == {
        1: "the cake",
        2: "error",
        3: "error",
        4: "error",
        5: "error",
        6: None,
        8: "error",
        9: "the cake",
    }
    assert [line.split(" ")[1] for line in result.stderr.splitlines()[:-1]] == [
        f"{path}:{line}:" for line in (2, 3, 4, 5, 8)
    ]
    assert result.stderr.splitlines()[-1].startswith(
        "lance-edge: 3 screened, 2 not allowed, 5 not screened"
    )


# Policies


def with_policy(tmp_path: Path, contents: str | bytes) -> tuple[str, str]:
    path = tmp_path / "policy.json"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return ("--policy", str(path))


@pytest.mark.parametrize(
    ("rules", "decision"),
    [
        ({}, "block"),
        ({"unrepaired": "review"}, "review"),
        ({"actions": {"violence": "advise"}}, "advise"),
        ({"actions": {"*": "review"}}, "review"),
        ({"actions": {"*": "allow", "violence": "block"}}, "block"),
        ({"thresholds": 0.99}, "allow"),
        ({"thresholds": {"violence": 0.99}}, "allow"),
        ({"thresholds": {"*": 0.99, "violence": 0.5}, "unrepaired": "review"}, "review"),
    ],
    ids=str,
)
def test_a_policy_decides(
    refine: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rules: dict[str, object],
    decision: str,
) -> None:
    Scripted(" ").install(monkeypatch)
    options = (*with_policy(tmp_path, json.dumps(rules)), "--looks", "1", "--format", "jsonl")
    (record,) = records(refine(FLAGGED, *options).stdout)
    assert record["decision"] == decision


def test_thresholds_on_the_command_line_count_before_the_policys(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Scripted(" ").install(monkeypatch)
    options = (*with_policy(tmp_path, '{"thresholds": 0.99}'), "--threshold", "violence=0.5")
    result = refine("bomb spy", *options, "--looks", "1", "--format", "jsonl")
    assert records(result.stdout)[0]["flagged"] == ["violence"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must hold an object, not list"),
        ('{"thresholds": 0.9, "thresholds": 0.1}', "'thresholds' stands there twice"),
        ('{"actions": {"*": "block", "*": "allow"}}', "'*' stands there twice"),
        ('{"threshold": 0.5}', "a policy has no threshold; it has thresholds, actions,"),
        ('{"thresholds": {"violance": 0.5}}', "did you mean violence?"),
        ('{"thresholds": {"violence": "high"}}', "threshold of violence must be a number above 0"),
        ('{"thresholds": {"violence": NaN}}', "threshold of violence must be a number above 0"),
        ('{"thresholds": [0.5]}', "must be a number above 0 and at most 1, not [0.5]"),
        ('{"actions": {"violence": "refine"}}', "must be one of allow, advise, rewrite, review"),
        ('{"actions": {"violence": ["block"]}}', "must be one of allow, advise, rewrite, review"),
        ('{"actions": "block"}', "actions must map categories to actions, not be 'block'"),
        ('{"actions": null}', "actions must map categories to actions, not be None"),
        ('{"unrepaired": "allow"}', "unrepaired must be block or review, not 'allow'"),
        ('{"on_error": "half"}', "on_error must be closed or open, not 'half'"),
        ('{"on_error": {}}', "on_error must be closed or open, not {}"),
        ('{"max_steps": 0}', "max_steps must be a whole number of at least 1, not 0"),
        ('{"max_steps": 1.5}', "max_steps must be a whole number of at least 1, not 1.5"),
        ('{"max_steps": true}', "max_steps must be a whole number of at least 1, not True"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_policy_is_wrong_usage(
    refine: Invoke, tmp_path: Path, contents: str | bytes, message: str
) -> None:
    result = refine("hello", *with_policy(tmp_path, contents))
    assert (result.exit_code, result.stdout) == (2, "")
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("lance-edge: ")
    assert message in sentence


def test_a_missing_policy_is_wrong_usage(refine: Invoke, tmp_path: Path) -> None:
    """As a missing file of prompts is."""
    result = refine("hello", "--policy", str(tmp_path / "no.json"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert str(tmp_path / "no.json") in result.stderr


@pytest.mark.parametrize(
    "options",
    [("--max-steps", "0"), ("--looks", "3"), ("--looks", "both"), ("--format", "csv")],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(refine: Invoke, options: tuple[str, ...]) -> None:
    result = refine("hello", *options)
    assert (result.exit_code, result.stdout) == (2, "")


# Looks


def test_looks_decide_who_reads_a_prompt(refine: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(" ").install(monkeypatch)

    def looks(option: str) -> list[int]:
        result = refine(OPEN, FLAGGED, "hello", "--looks", option, "--format", "jsonl")
        return [record["look"] for record in records(result.stdout)]

    assert looks("1") == [1, 1, 1]
    assert looks("2") == [2, 2, 2]
    assert looks("auto") == [2, 1, 1]


@pytest.mark.parametrize("prompt", [OPEN, FLAGGED, "hello", "the minor spy"])
def test_the_second_look_is_mixed_into_the_first(bundle: Path, prompt: str) -> None:
    with load(bundle, looks="1") as one, load(bundle, looks="2") as two:
        first, both = one.screen(prompt), two.screen(prompt)
        reading = two.refiner.read(prompt)
    assert (first.look, both.look) == (1, 2)
    severity = np.array(list(first.severity.values()))
    mean = reading.mean / spread_of(reading.deviation)
    expected = sigmoid((1 - SHARE) * logit(severity) + SHARE * mean)
    np.testing.assert_allclose(list(both.severity.values()), expected, rtol=1e-6)
    assert sum(both.distribution.values()) == pytest.approx(1)
    assert both.timings.look_ms > 0 == first.timings.look_ms
    if both.decision != "rewrite":
        with load(bundle, looks="2") as two:
            assert timeless(two.refine(prompt)) == timeless(both)


@pytest.mark.parametrize(("mean", "flagged"), [(20.0, 3), (-20.0, 0)])
def test_spans_are_of_what_both_looks_flag(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, mean: float, flagged: int
) -> None:
    real = Refiner.read
    monkeypatch.setattr(
        Refiner, "read", lambda *given: replace(real(*given), mean=np.full(3, mean))
    )
    with load(bundle, looks="2") as pipeline:
        verdict = pipeline.screen("the bomb spy")
    assert len(verdict.flagged) == flagged
    assert {span.category for span in verdict.spans} <= set(verdict.flagged)
    assert ("violence" in {span.category for span in verdict.spans}) == bool(flagged)


def test_a_prompt_too_long_for_the_second_look_gets_one(bundle: Path) -> None:
    with load(bundle, looks="2") as pipeline:
        assert pipeline.screen("cake " * PROMPT_TOKENS).look == 1


def test_the_second_look_reads_rewrites_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite is read as any prompt is: what the second look flags is not accepted."""
    Scripted("the cake").install(monkeypatch)
    real = Refiner.read

    def alarmed(refiner: Refiner, text: str) -> Reading:
        reading = real(refiner, text)
        return replace(reading, mean=np.full(3, 20.0 if text == "the cake" else 0.0))

    monkeypatch.setattr(Refiner, "read", alarmed)
    with load(bundle, looks="2", rules={"max_steps": 1}) as pipeline:
        verdict = pipeline.refine("the bomb bomb")
        assert verdict.decision == "block"
        assert "it is still flagged for" in (verdict.reason or "")
    with load(bundle, looks="1") as pipeline:
        assert pipeline.refine("the bomb bomb").refined == "the cake"


def test_looks_are_an_option_of_the_api(bundle: Path) -> None:
    with pytest.raises(lance_edge.InvalidOption, match="looks must be one of 1, 2, auto, not '3'"):
        load(bundle, looks="3")


# Faults


def broken(*_: object, **__: object) -> NoReturn:
    raise SessionError("the graph failed on cpu: no memory")


@pytest.mark.parametrize(
    ("rules", "decision"),
    [
        ({}, "block"),
        ({"unrepaired": "review"}, "review"),
        ({"on_error": "closed", "unrepaired": "review"}, "review"),
        ({"on_error": "open"}, "allow"),
    ],
    ids=str,
)
def test_a_failing_refiner_decides_by_the_policy(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, rules: dict[str, object], decision: str
) -> None:
    with load(bundle, looks="1", rules=rules) as pipeline:
        _ = pipeline.refiner
        monkeypatch.setattr(Decoder, "step", broken)
        flagged, harmless = pipeline.refine_many([FLAGGED, "hello"])
    assert (flagged.decision, flagged.refined) == (decision, None)
    assert flagged.reason == "the refiner failed: the graph failed on cpu: no memory"
    assert flagged.flagged == ("violence",)
    assert (harmless.decision, harmless.reason) == ("allow", None)
    SCHEMA.validate(json.loads(json.dumps(flagged.to_dict())))


@pytest.mark.parametrize("rules", [{"unrepaired": "review"}, {"on_error": "open"}], ids=str)
def test_a_failing_second_look_does_not_weaken_a_block(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, rules: dict[str, object]
) -> None:
    with load(bundle, looks="2", rules=rules) as pipeline:
        monkeypatch.setattr(Decoder, "step", broken)
        assert pipeline.refine(BLOCKED).decision == "block"


def test_a_failing_second_look_closes_what_it_should_have_read(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(bundle, rules={"unrepaired": "review"}) as pipeline:
        _ = pipeline.refiner
        monkeypatch.setattr(Decoder, "step", broken)
        verdict = pipeline.refine(OPEN)
        assert (verdict.decision, verdict.look) == ("review", 1)
        assert (verdict.reason or "").startswith("the refiner failed: ")
        with pytest.raises(SessionError):
            pipeline.screen(OPEN)


def test_a_failure_in_a_later_step_is_one_too(
    guard: lance_edge.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted("the spy").install(monkeypatch)
    real, calls = Decoder.step, []

    def second_breaks(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return broken() if len(calls) > 1 else real(*arguments, **options)

    monkeypatch.setattr(Decoder, "step", second_breaks)
    verdict = guard.refine(FLAGGED)
    assert (verdict.decision, verdict.refined) == ("block", None)
    assert (verdict.reason or "").startswith("the refiner failed: ")


def test_a_closed_refiner_cannot_be_used(bundle: Path) -> None:
    with load(bundle, looks="1") as pipeline:
        pipeline.refine(FLAGGED)
    with pytest.raises(SessionError, match="closed"):
        pipeline.refine(FLAGGED)


def test_a_command_with_a_broken_refiner_says_so_and_goes_on(
    refine: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "step", broken)
    result = refine(FLAGGED, "hello", "--looks", "1")
    assert "because the refiner failed: the graph failed on cpu" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("allow  ")
    assert result.exit_code == 1


# The API


def test_refine_many_is_refine_for_each(bundle: Path) -> None:
    prompts = [FLAGGED, "hello", OPEN, BLOCKED, "spy cake", OPEN]
    with load(bundle) as pipeline:
        together = [timeless(verdict) for verdict in pipeline.refine_many(prompts)]
        alone = [timeless(pipeline.refine(prompt)) for prompt in prompts]
    assert together == alone


def test_threads_get_what_one_thread_gets(bundle: Path) -> None:
    prompts = [FLAGGED, "spy", OPEN, "hello", "kill", BLOCKED]
    with load(bundle, looks="2", rules={"max_steps": 1}) as pipeline:
        expected = [timeless(pipeline.refine(prompt)) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(pipeline.refine, prompts))
    assert [timeless(verdict) for verdict in found] == expected
    assert any(verdict.steps for verdict in found)


def test_a_bad_prompt_among_many_is_named(guard: lance_edge.Pipeline) -> None:
    with pytest.raises(lance_edge.InvalidPrompt, match="prompt 1: the prompt is empty"):
        guard.refine_many(["hello", " "])


def test_no_prompts_no_verdicts(guard: lance_edge.Pipeline) -> None:
    assert guard.refine_many([]) == []


def test_refine_without_weights_is_missing(bundle: Path, not_pulled: Path) -> None:
    with load(bundle) as pipeline, pytest.raises(lance_edge.RefinerMissing) as caught:
        pipeline.refine("hello")
    opened = open_bundle(bundle)
    assert opened.manifest.refiner is not None
    assert str(weights_path(opened, opened.manifest.refiner)) in str(caught.value)
