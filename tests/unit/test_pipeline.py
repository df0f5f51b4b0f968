"""One request from top to bottom, on a bundle whose numbers can be worked out by hand."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny
from tiny import BIAS, severity_of

import lance_edge


def test_severity_is_the_posterior_mean(guard: lance_edge.Pipeline) -> None:
    verdict = guard.screen("hello bomb")
    assert verdict.severity == pytest.approx(
        {
            "violence": severity_of(BIAS + 8),
            "privacy": severity_of(BIAS),
            "child": severity_of(BIAS),
        }
    )
    assert verdict.decision == "rewrite"
    assert verdict.flagged == ("violence",)


def test_benign_prompt_is_allowed(guard: lance_edge.Pipeline) -> None:
    verdict = guard.screen("hello the cake")
    assert (verdict.decision, verdict.flagged, verdict.spans) == ("allow", (), ())


def test_strongest_action_decides(guard: lance_edge.Pipeline) -> None:
    verdict = guard.screen("bomb minor")
    assert verdict.flagged == ("child", "violence")  # the most severe first
    assert verdict.decision == "block"


def test_a_sentence_whose_hazard_the_whole_hides_decides(guard: lance_edge.Pipeline) -> None:
    """The whole is flagged for violence alone; its last sentence would be blocked for "child"."""
    prompt = "bomb bomb. safely. safely. the minor."
    verdict = guard.screen(prompt)
    assert set(verdict.flagged) == {"violence", "child"}
    assert verdict.decision == "block"
    assert verdict.severity["child"] == guard.screen("the minor.").severity["child"]
    assert verdict.deviation["child"] == guard.screen("the minor.").deviation["child"]
    # What the whole shows is as severe as in the whole: alone, the first sentence would be more severe.
    assert verdict.severity["violence"] == pytest.approx(severity_of(BIAS + 16 - 6 + 0.1))
    assert sum(verdict.distribution.values()) == pytest.approx(1)
    assert {(prompt[s.start : s.end], s.category) for s in verdict.spans} == {
        ("bomb bomb", "violence"),
        ("minor", "child"),
    }


def test_sentences_of_a_prompt_that_is_clearly_harmless_are_not_read_apart(
    guard: lance_edge.Pipeline,
) -> None:
    verdict = guard.screen("safely safely safely safely. bomb")
    assert (verdict.decision, verdict.windows) == ("allow", 1)
    assert guard.screen("safely safely. bomb").decision == "rewrite"


def test_distribution_has_none_and_sums_to_one(guard: lance_edge.Pipeline) -> None:
    verdict = guard.screen("bomb spy")
    severities = list(verdict.severity.values())
    none = (1 - severities[0]) * (1 - severities[1]) * (1 - severities[2])
    assert verdict.distribution["none"] == pytest.approx(none)
    assert sum(verdict.distribution.values()) == pytest.approx(1)
    ratio = verdict.distribution["violence"] / verdict.distribution["child"]
    assert ratio == pytest.approx(severities[0] / severities[2])


def test_spans_are_offsets_into_the_original_text(guard: lance_edge.Pipeline) -> None:
    text = "  Hello,\tthe BOMB? 日本語 spy"
    spans = {span.category: text[span.start : span.end] for span in guard.screen(text).spans}
    assert spans == {"violence": "BOMB", "privacy": "spy"}


def test_long_prompt_is_read_in_full(guard: lance_edge.Pipeline) -> None:
    """A hazard is found wherever it stands; the window holds 14 words."""
    for position in range(0, 100, 7):
        words = ["hello"] * 100
        words[position] = "bomb"
        text = " ".join(words)
        verdict = guard.screen(text)
        assert verdict.windows > 1
        assert verdict.severity["violence"] == pytest.approx(severity_of(BIAS + 8))
        assert [text[span.start : span.end] for span in verdict.spans] == ["bomb"]


def test_neighbouring_windows_share_words(guard: lance_edge.Pipeline) -> None:
    windows = guard.encode(" ".join(["hello"] * 40)).windows
    for left, right in pairwise(windows):
        shared = set(map(tuple, left.offsets[1:-1])) & set(map(tuple, right.offsets[1:-1]))
        assert len(shared) == guard.tokenizer.overlap
    ends = {tuple(offset) for window in windows for offset in window.offsets[1:-1].tolist()}
    assert len(ends) == 40  # every word is in some window


def test_special_tokens_in_a_prompt_are_plain_text(guard: lance_edge.Pipeline) -> None:
    (window,) = guard.encode("hello [SEP] [PAD] bomb").windows
    separator = guard.tokenizer.encode("hello")[0].ids[-1]
    assert (window.ids == separator).sum() == 1
    assert guard.screen("hello [SEP] [PAD] bomb").flagged == ("violence",)


def test_a_verdict_does_not_depend_on_its_batch(guard: lance_edge.Pipeline) -> None:
    texts = [" ".join(["hello"] * n + ["bomb", "the"] * (n % 3)) for n in range(1, 60)]
    together = guard.screen_many(texts)
    for text, verdict in zip(texts, together, strict=True):
        assert guard.screen(text).severity == verdict.severity


def test_threads_get_identical_verdicts(guard: lance_edge.Pipeline) -> None:
    texts = [f"the bomb {'cake ' * (n % 5)}spy" for n in range(64)]
    expected = [guard.screen(text).severity for text in texts]
    with ThreadPoolExecutor(64) as pool:
        verdicts = list(pool.map(guard.screen, texts))
    assert [verdict.severity for verdict in verdicts] == expected


def test_verdict_follows_its_schema(guard: lance_edge.Pipeline) -> None:
    schema = json.loads(files("lance_edge").joinpath("verdict.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    for text in ("hello", "bomb spy minor", "the " * 50):
        values = json.loads(json.dumps(guard.screen(text).to_dict()))
        validator.validate(values)
    values["surprise"] = 1
    assert not validator.is_valid(values)


def test_thresholds_can_be_changed_at_load(tiny_bundle: Path) -> None:
    with lance_edge.load(tiny_bundle, thresholds={"violence": 0.99}) as strict:
        assert strict.screen("bomb spy").flagged == ("privacy",)
    with lance_edge.load(tiny_bundle, thresholds=0.01) as lax:
        assert lax.screen("hello").flagged == ("violence", "privacy", "child")


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"violance": 0.5}, "no category 'violance'; did you mean violence"),
        ({"violence": 1.5}, "must be a number above 0 and at most 1, not 1.5"),
        (float("nan"), "must be a number above 0 and at most 1, not nan"),
    ],
)
def test_wrong_thresholds_are_refused(tiny_bundle: Path, thresholds: object, message: str) -> None:
    with pytest.raises(lance_edge.InvalidOption, match=message):
        lance_edge.load(tiny_bundle, thresholds=thresholds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n\t\u2003", "empty"),
        ("\u200b\u200d", "invisible"),
        ("bo\0mb", "NUL character at position 2"),
        ("bomb\ud800", "lone surrogate at position 4"),
        ("x" * 1_000_001, "1,000,001 characters and the limit is 1,000,000"),
        (b"bomb", "must be a str, not bytes"),
    ],
)
def test_unreadable_prompts_are_refused(
    guard: lance_edge.Pipeline, text: str, message: str
) -> None:
    with pytest.raises(lance_edge.InvalidPrompt, match=message):
        guard.screen(text)


def test_a_text_is_no_list_of_texts(guard: lance_edge.Pipeline) -> None:
    for many in (guard.screen_many, guard.refine_many):
        with pytest.raises(lance_edge.InvalidPrompt, match="one text was given and a list"):
            many("hello")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 1.5}, "threads must be a whole number of at least 1, not 1.5"),
        ({"threads": 257}, "threads must be at most 256, not 257"),
        ({"threads": "2"}, "threads must be a whole number of at least 1, not '2'"),
        ({"max_chars": None}, "max_chars must be a whole number of at least 1, not None"),
        ({"max_chars": 0}, "max_chars must be a whole number of at least 1, not 0"),
        ({"rules": 5}, "rules must map settings to values or be a policy file's path, not 5"),
        ({"rules": {1: 2}}, "a policy has no 1; it has"),
    ],
)
def test_options_that_cannot_be(tiny_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(lance_edge.InvalidOption, match=message):
        lance_edge.load(tiny_bundle, "cpu", **options)


def test_rules_may_be_a_policy_file(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text('{"actions": {"violence": "review"}}', encoding="utf-8")
    for rules in (path, str(path)):
        with lance_edge.load(tiny_bundle, "cpu", rules=rules) as pipeline:
            assert pipeline.screen("bomb").decision == "review"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"max_steps": 1, "max_steps": 2}', "'max_steps' stands there twice"),
        ("[]", "must hold an object, not list"),
    ],
)
def test_a_policy_file_that_is_none(
    tiny_bundle: Path, tmp_path: Path, contents: str | None, message: str
) -> None:
    path = tmp_path / "policy.json"
    if contents is not None:
        path.write_text(contents, encoding="utf-8")
    with pytest.raises(lance_edge.InvalidOption, match=f"the policy file {path} .*{message}"):
        lance_edge.load(tiny_bundle, "cpu", rules=path)


def test_a_bundle_s_close_reading_is_done(tmp_path: Path) -> None:
    folder = tiny.write_bundle(tmp_path / "close", window=40)
    text = "cake " * 20 + "bomb " + "cake " * 10
    with lance_edge.load(folder, "cpu") as once:
        plain = once.screen(text)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    close = {"window": 8, "overlap": 4, "low": 0.0, "high": 0.5, "discount": 0.0}
    manifest["screener"]["close"] = close
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with lance_edge.load(folder, "cpu") as closely:
        read = closely.screen(text)
        assert len(closely.encode(text).windows) == plain.windows == 1
    assert read.windows > 1
    assert read.tokens > plain.tokens
    assert read.severity["violence"] > plain.severity["violence"]


def test_numbers_of_numpy_are_numbers(tiny_bundle: Path) -> None:
    rules = {"max_steps": np.int64(2)}
    with lance_edge.load(tiny_bundle, "cpu", thresholds=np.float32(0.5), rules=rules) as pipeline:
        assert pipeline.policy.max_steps == 2
        assert pipeline.policy.thresholds.tolist() == [0.5] * 3


def test_a_bad_prompt_among_many_is_named(guard: lance_edge.Pipeline) -> None:
    with pytest.raises(lance_edge.InvalidPrompt, match="prompt 2: the prompt is empty"):
        guard.screen_many(["hello", "bomb", "", "spy"])


def test_no_prompts_no_verdicts(guard: lance_edge.Pipeline) -> None:
    assert guard.screen_many([]) == []


def test_taxonomy_is_the_bundles_own(tmp_path: Path) -> None:
    bundle = tiny.write_bundle(tmp_path / "own")
    with lance_edge.load(bundle) as pipeline:
        assert tuple(pipeline.screen("hello").severity) == tiny.CATEGORIES
