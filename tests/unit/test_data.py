"""From rows of a file to the tensors of a training step."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tiny

torch = pytest.importorskip("torch", reason="needs torch (the train extra)")

from lance_edge.tokenizer import Tokenizer
from lance_edge_training.data import (
    Corpus,
    Deal,
    Example,
    binarise,
    coarse_view,
    development_examples,
    pair_examples,
    prompt_example,
    read_rows,
    training_examples,
)

pytestmark = pytest.mark.train

CATEGORIES = tiny.CATEGORIES  # violence, privacy, child
ALL_ABSENT = dict.fromkeys(CATEGORIES, 0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny.tokenizer().to_str().encode(), 16, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with rows that may be trained on and rows that may not."""
    return write_data(
        tmp_path,
        train=[prompt_row("bomb", labels=["violence"]), prompt_row("spy", may_train=False)],
        dev=[prompt_row("minor", may_train=False)],
        pairs=[pair_row("the bomb", "the cake"), pair_row("kill", "cake", may_train=False)],
        test=[pair_row("the spy", "the cake", may_train=False)],
    )


def test_training_reads_only_rows_whose_licence_allows_it(folder: Path) -> None:
    examples = training_examples([folder], CATEGORIES)
    assert [example.prompt for example in examples] == ["bomb", "the bomb", "the cake"]


@pytest.mark.parametrize("may_train", [False, None, 1, "true"])
def test_only_a_plain_true_allows_training(tmp_path: Path, may_train: object) -> None:
    write_data(
        tmp_path,
        train=[prompt_row("bomb", may_train=may_train)],
        pairs=[pair_row("spy", "cake", may_train=may_train)],
    )
    assert training_examples([tmp_path], CATEGORIES) == []


def test_several_folders_are_read_in_turn_gzipped_or_not(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    row = prompt_row("the spy", severity={"privacy": 0.7}, spans=["spy"], group="g1")
    write_text(own / "prompts" / "train.jsonl", json.dumps(row) + "\n")  # it has no pairs
    examples = training_examples([folder, own], CATEGORIES)
    assert [example.prompt for example in examples] == ["bomb", "the bomb", "the cake", "the spy"]
    assert (examples[-1].spans, examples[-1].group) == (("spy",), "g1")


def test_a_folder_without_training_rows_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mistyped has neither prompts/train\.jsonl"):
        training_examples([folder, tmp_path / "mistyped"], CATEGORIES)


def test_a_file_beside_its_archive_is_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.jsonl.gz"):
        write_text(tmp_path / "prompts" / name, json.dumps(prompt_row("bomb")) + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl stands beside train\.jsonl\.gz"):
        training_examples([tmp_path], CATEGORIES)


def test_a_folder_without_development_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts/dev\.jsonl"):
        development_examples(tmp_path, CATEGORIES)


def test_development_reads_every_row_and_no_rewrites(folder: Path) -> None:
    examples = development_examples(folder, CATEGORIES)
    assert [example.prompt for example in examples] == ["minor", "the spy"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_broken_line_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_text(path, '{"id": 1}\n{"id": 2\n')
    rows = read_rows(path)
    assert next(rows) == {"id": 1}
    with pytest.raises(ValueError, match=rf"{name}, line 2: Expecting"):
        next(rows)


@pytest.mark.parametrize("field", [{"labels": ["robbery"]}, {"severity": {"robbery": 0.7}}])
def test_an_unknown_category_names_the_row(field: dict[str, Any]) -> None:
    message = r"row bomb-1: categories \['robbery'\] are not in the taxonomy"
    with pytest.raises(ValueError, match=message):
        prompt_example(prompt_row("bomb", id="bomb-1", **field), CATEGORIES)


def test_an_unknown_category_of_a_pair_names_the_row() -> None:
    row = pair_row("bomb", "cake", id="w-7", severity={"robbery": 0.7})
    with pytest.raises(ValueError, match=r"row w-7: categories \['robbery'\]"):
        pair_examples(row, CATEGORIES)


def test_a_coarse_row_speaks_of_its_labels_alone() -> None:
    example = prompt_example(prompt_row("spy", harmful=True, labels=["privacy"]), CATEGORIES)
    assert example.labels == {"privacy": 1.0}
    assert (example.severity, example.harmful) == (None, True)
    assert example.positive == {"privacy"}


def test_a_benign_row_speaks_of_every_category() -> None:
    example = prompt_example(prompt_row("cake", harmful=False), CATEGORIES)
    assert example.labels == ALL_ABSENT
    assert example.positive == frozenset()
    assert example.easy


@pytest.mark.parametrize(
    ("severity", "harmful"),
    [
        ({"violence": 0.1, "privacy": 0.5}, True),
        ({"violence": 0.49}, None),
        ({"violence": 0.21}, None),
        ({"violence": 0.2}, False),
        ({}, False),
    ],
)
def test_severities_decide_whether_a_graded_row_is_harmful(
    severity: dict[str, float], harmful: bool | None
) -> None:
    row = prompt_row("bomb", harmful=True, severity=severity)  # the source says yes each time
    example = prompt_example(row, CATEGORIES)
    assert example.harmful is harmful
    assert not example.easy


def test_the_rewrite_of_a_pair_becomes_a_benign_twin() -> None:
    row = pair_row("the bomb", "the cake", spans=["bomb"], group="g1")
    prompt, twin = pair_examples(row, CATEGORIES)
    assert prompt == Example(
        "the bomb", "own", "harmful", {}, {"violence": 0.8}, True, ("bomb",), "g1"
    )
    assert twin == Example("the cake", "own", "refined", ALL_ABSENT, None, False)
    assert not twin.easy  # the twins are what the screener is to tell apart


@pytest.mark.parametrize("action", ["keep", "block"])
def test_other_pairs_give_their_prompt_alone(action: str) -> None:
    examples = pair_examples(pair_row("the bomb", "the cake", action=action), CATEGORIES)
    assert [example.prompt for example in examples] == ["the bomb"]


def test_binarise_cuts_severities_at_one_half() -> None:
    example = graded({"violence": 0.5, "privacy": 0.49}, spans=("bomb",), group="g")
    assert binarise(example, CATEGORIES) == Example(
        "bomb", "own", "harmful", {**ALL_ABSENT, "violence": 1.0}, None, True, ("bomb",), "g"
    )


def test_binarise_leaves_coarse_rows_as_they_are() -> None:
    example = prompt_example(prompt_row("spy", labels=["privacy"]), CATEGORIES)
    assert binarise(example, CATEGORIES) == example


def test_coarse_views_are_all_one_or_none_and_agree_with_the_severities() -> None:
    example = graded({"violence": 0.9, "privacy": 0.3, "child": 0.5})
    rng = random.Random(0)
    seen = Counter(
        tuple(sorted(coarse_view(example, CATEGORIES, rng).items())) for _ in range(3000)
    )
    everything = (("child", 1.0), ("privacy", 0.0), ("violence", 1.0))
    one = [(("child", 1.0),), (("violence", 1.0),)]
    assert set(seen) == {everything, *one, ()}
    # A third each, and the one positive is any of the two: 4 standard errors of 3000 draws.
    assert seen[everything] == pytest.approx(1000, abs=104)
    assert seen[()] == pytest.approx(1000, abs=104)
    assert seen[one[0]] == pytest.approx(500, abs=82)


def test_coarse_view_of_a_row_without_positives_is_all_or_none() -> None:
    example = graded({"violence": 0.4})
    rng = random.Random(0)
    views = [coarse_view(example, CATEGORIES, rng) for _ in range(50)]
    assert all(view in (ALL_ABSENT, {}) for view in views)
    assert ALL_ABSENT in views
    assert {} in views


def test_an_epoch_deals_every_hard_row_once(tokenizer: Tokenizer) -> None:
    corpus = Corpus(hard_rows(90), CATEGORIES, tokenizer, tokens_per_batch=64, seed=1)
    for epoch in range(3):
        assert sorted(deal.index for deal in chain(*corpus.batches(epoch))) == list(range(90))


def test_batches_depend_on_seed_and_epoch_alone(tokenizer: Tokenizer) -> None:
    corpus, same, other = (
        Corpus(hard_rows(90), CATEGORIES, tokenizer, tokens_per_batch=64, seed=seed)
        for seed in (1, 1, 2)
    )
    first = corpus.batches(0)
    random.seed(99)  # no draw of anyone else matters
    assert corpus.batches(1) != first
    assert corpus.batches(0) == same.batches(0) == first
    assert other.batches(0) != first


@pytest.mark.parametrize("budget", [16, 40, 64, 10_000])
def test_batches_keep_to_the_token_budget(tokenizer: Tokenizer, budget: int) -> None:
    examples = hard_rows(90)
    corpus = Corpus(examples, CATEGORIES, tokenizer, budget, seed=1)
    rng = random.Random(0)
    for deals in corpus.batches(0):
        rows, tokens = corpus.collate(deals, rng).ids.shape
        assert rows == len(deals)
        assert rows * tokens <= budget


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own(tokenizer: Tokenizer) -> None:
    corpus = Corpus(hard_rows(6), CATEGORIES, tokenizer, tokens_per_batch=1, seed=1)
    batches = [[deal.index for deal in deals] for deals in corpus.batches(0)]
    assert sorted(batches) == [[0], [1], [2], [3], [4], [5]]


def test_an_epoch_deals_another_share_of_the_easy_rows_each_time(tokenizer: Tokenizer) -> None:
    easy = [prompt_example(prompt_row("cake", harmful=False), CATEGORIES)] * 400
    corpus = Corpus([*hard_rows(50), *easy], CATEGORIES, tokenizer, 256, seed=1, easy_share=0.25)
    dealt = [{deal.index for deal in chain(*corpus.batches(epoch))} for epoch in range(4)]
    for rows in dealt:
        assert rows.issuperset(range(50))
        assert len(rows) - 50 == pytest.approx(100, abs=35)  # 4 standard deviations
    assert len(set.union(*dealt)) > 270  # 50 + 400 (1 - 0.75^4) = 323 if drawn anew each time


def test_no_rows_no_batches(tokenizer: Tokenizer) -> None:
    easy = prompt_example(prompt_row("cake", harmful=False), CATEGORIES)
    assert Corpus([], CATEGORIES, tokenizer, 64, seed=1).batches(0) == []
    assert Corpus([easy], CATEGORIES, tokenizer, 64, seed=1, easy_share=0.0).batches(0) == []


def strings(tokenizer: Tokenizer) -> Corpus:
    """A marked hazard, a harmless row, a faint one, one of unknown harm: each dealt in a string too."""
    examples = [
        graded({"violence": 0.8}, prompt="the bomb", spans=("bomb",)),
        prompt_example(prompt_row("cake cake", harmful=False), CATEGORIES),
        prompt_example(prompt_row("spy", severity={"privacy": 0.1}), CATEGORIES),
        prompt_example(prompt_row("kill", harmful=None), CATEGORIES),
    ]
    return Corpus(examples, CATEGORIES, tokenizer, 64, seed=1, strung_share=1.0)


def test_strung_rows_are_dealt_once_more_between_harmless_ones(tokenizer: Tokenizer) -> None:
    corpus = strings(tokenizer)
    deals = [deal for epoch in range(20) for deal in chain(*corpus.batches(epoch))]
    assert sorted(deal.index for deal in deals) == sorted([0, 1, 2, 3] * 2 * 20)
    assert {other for deal in deals for other in deal.before + deal.after} == {1}
    hazards = [deal for deal in deals if deal.index == 0 and len(deal.parts) > 1]
    assert {bool(deal.before) for deal in hazards} == {bool(deal.after) for deal in hazards}
    assert len({len(deal.parts) for deal in hazards}) > 1


def test_a_string_is_one_text_no_longer_than_a_window(tokenizer: Tokenizer) -> None:
    corpus = strings(tokenizer)
    for epoch in range(20):
        for deals in corpus.batches(epoch):
            batch = corpus.collate(deals, random.Random(0))
            assert batch.ids.shape[1] <= tokenizer.window
            assert (batch.ids == id_of("[CLS]")[0]).sum(1).tolist() == [1] * len(deals)
            assert (batch.ids == id_of("[SEP]")[0]).sum(1).tolist() == [1] * len(deals)


def test_a_string_keeps_the_labels_and_marks_of_its_example(tokenizer: Tokenizer) -> None:
    batch = strings(tokenizer).collate([Deal(0, before=(1,), after=(1,))], random.Random(0))
    text = ("cake", "cake", "the", "bomb", "cake", "cake")
    assert batch.ids.tolist() == [id_of("[CLS]", *text, "[SEP]")]
    assert batch.span.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0]]
    assert torch.equal(batch.severity, torch.tensor([[0.8, 0.0, 0.0]]))


def test_without_harmless_rows_a_string_is_its_example(tokenizer: Tokenizer) -> None:
    rows = [graded({"violence": 0.8})]
    corpus = Corpus(rows, CATEGORIES, tokenizer, 64, seed=1, strung_share=1.0)
    assert corpus.batches(0) == [[Deal(0), Deal(0)]]


def test_tensors_of_a_graded_row(tokenizer: Tokenizer) -> None:
    example = graded({"violence": 0.8, "privacy": 0.3}, prompt="the bomb cake", spans=("bomb",))
    batch = collate(tokenizer, example)
    assert batch.ids.tolist() == [id_of("[CLS]", "the", "bomb", "cake", "[SEP]")]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1]]
    assert batch.span.tolist() == [[0, 0, 1, 0, 0]]
    assert batch.graded.tolist() == [1]
    assert batch.harmful.tolist() == [1]
    assert torch.equal(batch.severity, torch.tensor([[0.8, 0.3, 0.0]]))


def test_a_graded_row_shows_the_posterior_a_coarse_view(tokenizer: Tokenizer) -> None:
    example = graded({"violence": 0.8, "privacy": 0.3})
    told = {
        (tuple(batch.observed[0].tolist()), tuple(batch.coarse[0].tolist()))
        for batch in (collate(tokenizer, example, seed=seed) for seed in range(30))
    }
    everything, one, none = ((1, 1, 1), (1, 0, 0)), ((1, 0, 0), (1, 0, 0)), ((0, 0, 0), (0, 0, 0))
    assert told == {everything, one, none}


def test_tensors_of_a_coarse_row(tokenizer: Tokenizer) -> None:
    example = prompt_example(prompt_row("spy", harmful=True, labels=["privacy"]), CATEGORIES)
    batch = collate(tokenizer, example)
    assert batch.observed.tolist() == [[0, 1, 0]]
    assert batch.coarse.tolist() == [[0, 1, 0]]
    assert batch.severity.tolist() == [[0, 0, 0]]
    assert (batch.graded.tolist(), batch.harmful.tolist()) == ([0], [1])
    assert batch.span.tolist() == [[0, 0, 0]]


def test_tensors_of_a_benign_row(tokenizer: Tokenizer) -> None:
    batch = collate(tokenizer, prompt_example(prompt_row("cake", harmful=False), CATEGORIES))
    assert batch.observed.tolist() == [[1, 1, 1]]
    assert batch.coarse.tolist() == [[0, 0, 0]]
    assert (batch.graded.tolist(), batch.harmful.tolist()) == ([0], [0])


def test_tensors_of_a_row_of_unknown_harm(tokenizer: Tokenizer) -> None:
    batch = collate(tokenizer, prompt_example(prompt_row("cake", harmful=None), CATEGORIES))
    assert batch.observed.tolist() == [[0, 0, 0]]
    assert batch.harmful.tolist() == [-1]


def test_shorter_rows_are_padded(tokenizer: Tokenizer) -> None:
    examples = [graded({}, prompt="hello the bomb", spans=("bomb",)), graded({}, prompt="spy")]
    corpus = Corpus(examples, CATEGORIES, tokenizer, 64, seed=1)
    batch = corpus.collate([Deal(0), Deal(1)], random.Random(0))
    assert batch.ids[1].tolist() == [*id_of("[CLS]", "spy", "[SEP]"), 0, 0]
    assert batch.mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.span.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]


def test_several_spans_and_spans_inside_a_word_are_marked(tokenizer: Tokenizer) -> None:
    example = graded({}, prompt="kill the cake bomb spy", spans=("kill", "ake bo", "gone"))
    batch = collate(tokenizer, example)
    assert batch.span.tolist() == [[0, 1, 0, 1, 1, 0, 0]]


def test_a_prompt_is_read_up_to_the_training_window(tokenizer: Tokenizer) -> None:
    example = graded({}, prompt="hello " * 40 + "bomb", spans=("bomb",))
    batch = collate(tokenizer, example)
    assert batch.ids.shape == (1, 16)
    assert batch.span.sum() == 0


def prompt_row(prompt: str, **fields: Any) -> dict[str, Any]:
    row = {"id": prompt, "prompt": prompt, "source": "src", "harmful": None, "labels": []}
    return {**row, "may_train": True, **fields}


def pair_row(prompt: str, refined: str, **fields: Any) -> dict[str, Any]:
    row = {"id": prompt, "prompt": prompt, "refined": refined, "source": "own", "kind": "harmful"}
    row |= {"severity": {"violence": 0.8}, "spans": [], "action": "rewrite", "may_train": True}
    return {**row, **fields}


def graded(
    severity: dict[str, float],
    prompt: str = "bomb",
    spans: tuple[str, ...] = (),
    group: str | None = None,
) -> Example:
    return Example(prompt, "own", "harmful", {}, severity, True, spans, group)


def hard_rows(count: int) -> list[Example]:
    """Graded rows of 3 to 16 tokens."""
    return [graded({}, prompt="hello " * (1 + 5 * n % 14)) for n in range(count)]


def collate(tokenizer: Tokenizer, example: Example, seed: int = 0) -> Any:
    return Corpus([example], CATEGORIES, tokenizer, 64, seed=1).collate(
        [Deal(0)], random.Random(seed)
    )


def id_of(*tokens: str) -> list[int]:
    return [tiny.tokenizer().token_to_id(token) for token in tokens]


def write_data(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    names = {
        "train": "prompts/train.jsonl.gz",
        "dev": "prompts/dev.jsonl.gz",
        "pairs": "pairs/train.jsonl",
        "test": "pairs/test.jsonl",
    }
    for split, name in names.items():
        rows = splits.get(split, [])
        write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = text.encode()
    path.write_bytes(gzip.compress(contents) if path.suffix == ".gz" else contents)
