"""The project's own training rows hold together."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "training" / "data"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs the repository, not the wheel")


def read(kind: str, split: str = "train") -> list[dict[str, Any]]:
    with gzip.open(FOLDER / kind / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return read("prompts") + read("prompts", "dev") + read("pairs")


def test_no_group_is_both_trained_on_and_held_out() -> None:
    trained = {row["group"] for row in read("prompts") + read("pairs")}
    assert trained.isdisjoint(row["group"] for row in read("prompts", "dev"))


def test_ids_and_prompts_are_unique(rows: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in rows}) == len(rows) > 3000
    assert len({" ".join(row["prompt"].lower().split()) for row in rows}) == len(rows)


def test_severities_are_of_the_default_taxonomy(rows: list[dict[str, Any]]) -> None:
    taxonomy = FOLDER.parent / "lance_edge_training" / "default_taxonomy.json"
    known = {entry["name"] for entry in json.loads(taxonomy.read_text(encoding="utf-8"))}
    for row in rows:
        assert set(row["severity"]) <= known, row["id"]
        assert all(0 < severity <= 1 for severity in row["severity"].values()), row["id"]


def test_spans_are_in_their_prompts_and_mark_what_is_hazardous(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert all(span in row["prompt"] for span in row["spans"]), row["id"]
        hazardous = max(row["severity"].values(), default=0) > 0.2
        assert bool(row["spans"]) == hazardous == (row["kind"] != "hard_benign"), row["id"]


def test_nearly_every_contrast_group_has_both_sides(rows: list[dict[str, Any]]) -> None:
    """Some lost a twin that was near to a held-out prompt. A repair needs none."""
    sides = defaultdict(set)
    for row in rows:
        if row["id"].startswith(("repair-", "thorough-", "near-r")):
            continue
        sides[row["group"]].add(row["kind"] == "hard_benign")
    alone = [group for group, found in sides.items() if len(found) < 2]
    assert len(alone) < 0.02 * len(sides), alone


def test_pairs_turn_their_spans_and_keep_the_rest() -> None:
    for row in read("pairs"):
        if row["action"] == "keep":
            assert row["refined"] == row["prompt"], row["id"]
            continue
        strong = {name for name, severity in row["severity"].items() if severity >= 0.3}
        near = row["id"].startswith("near-")  # no sentences; "how to spot a fake id" keeps a word
        assert set(row["gradient"]) == (set() if near else strong), row["id"]
        assert row["refined"].strip() and row["refined"] != row["prompt"], row["id"]
        marked = [span for span in row["spans"] if not near or " " in span]
        assert not any(span in row["refined"] for span in marked), row["id"]


def test_preferences_speak_of_our_prompts_and_prefer_something(rows: list[dict[str, Any]]) -> None:
    prompts = {row["prompt"] for row in rows}
    found = read("preferences")
    assert len({row["id"] for row in found}) == len(found) > 400
    for row in found:
        assert row["prompt"] in prompts, row["id"]
        assert row["chosen"] and row["rejected"] and row["critique"], row["id"]
        texts = [text.strip() for text in row["chosen"] + row["rejected"]]
        assert len(set(texts)) == len(texts), row["id"]
        assert row["prompt"].strip() not in texts[: len(row["chosen"])], row["id"]


def test_every_row_may_be_trained_on_and_is_ours(rows: list[dict[str, Any]]) -> None:
    every = [*rows, *read("preferences")]
    assert {(row["source"], row["may_train"]) for row in every} == {("own", True)}
