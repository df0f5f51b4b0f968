"""Preferred rewrites: their trees, the loss, and a whole run on a tiny refiner."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny

torch = pytest.importorskip("torch", reason="needs torch (the train extra)")
pytest.importorskip("transformers", reason="needs transformers (the train extra)")
pytest.importorskip("gguf", reason="needs gguf (the dev extra)")

import tiny_refiner
import typer
from torch.nn import functional
from typer.testing import CliRunner

from lance_edge_training import prefer
from lance_edge_training.base_model import base_tokenizer, load_base
from lance_edge_training.data import DataError
from lance_edge_training.prefer import PreferSettings, PreferTrainer, log_probabilities
from lance_edge_training.preferences import (
    Preference,
    Tree,
    collate_trees,
    load_preferences,
    tree,
    tree_batches,
)
from lance_edge_training.refiner import (
    TEMPLATE,
    Refiner,
    RefinerSettings,
    load_refiner,
    save_refiner,
)

pytestmark = pytest.mark.train

SETTINGS = PreferSettings(epochs=6, rate=5e-3, held_out=2, tokens_per_batch=300)


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "prompt": f"hello {number} the bomb",
        "critique": "no violence: the bomb",
        "chosen": [f"hello {number} the cake"],
        "rejected": [f"hello {number} the bomb the bomb", f"kill {number}"],
        "source": "own",
        "may_train": True,
        **changes,
    }


def preferences(count: int) -> list[Preference]:
    rows = [row(number) for number in range(count)]
    return [
        Preference(r["prompt"], r["critique"], tuple(r["chosen"]), tuple(r["rejected"]))
        for r in rows
    ]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "preferences").mkdir(parents=True)
    lines = "".join(json.dumps(item) + "\n" for item in rows)
    (folder / "preferences" / "train.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_refiner.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refiner whose delta changes nothing yet."""
    torch.manual_seed(3)
    out = tmp_path_factory.mktemp("runs") / "refiner"
    settings = RefinerSettings()
    refiner = Refiner(load_base(base), len(tiny.CATEGORIES), settings)
    description = {
        "template": vars(TEMPLATE),
        "base_sha256": hashlib.sha256(base.read_bytes()).hexdigest(),
        "categories": list(tiny.CATEGORIES),
        "provenance": {"settings": vars(settings)},
    }
    save_refiner(refiner, out, base_tokenizer(base).to_str(), description)
    return out


@pytest.fixture
def refiner(checkpoint: Path, base: Path) -> Refiner:
    return load_refiner(checkpoint, base)[0]


def test_a_tree_says_of_each_branch_what_a_sequence_of_its_own_would(refiner: Refiner) -> None:
    trees = [
        Tree([5, 9, 3, 7, 2], [[4, 6, 8, 1], [6], [9, 9, 1]], 1),
        Tree([8, 3], [[7, 1], [3, 4, 5, 6, 7, 1]], 1),
    ]
    with torch.no_grad():
        together = log_probabilities(refiner.network, collate_trees(trees))
        alone = []
        for item in trees:
            for branch in item.branches:
                logits = refiner.network(torch.tensor([item.stem + branch])).logits[0]
                said = functional.log_softmax(logits[len(item.stem) - 1 : -1], -1)
                alone.append(said[torch.arange(len(branch)), torch.tensor(branch)].sum())
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_each_chosen_branch_is_set_against_each_rejected_one_of_its_tree() -> None:
    trees = [Tree([1], [[2], [3], [4]], 2), Tree([1], [[2], [3], [4]], 1)]
    batch = collate_trees(trees)
    assert batch.pairs.tolist() == [[0, 2], [1, 2], [3, 4], [3, 5]]
    assert batch.lengths.tolist() == [1] * 6


def test_a_tree_reads_what_the_runtime_reads() -> None:
    language = tiny_refiner.language()
    found = tree(preferences(1)[0], language, 2, random.Random(0))
    prompt = language.encode("hello 0 the bomb")
    stem = language.before_critique(prompt) + language.after_prompt("no violence: the bomb")
    assert found.stem == stem
    assert found.branches[0] == [*language.encode("hello 0 the cake"), language.end]
    assert (found.chosen, len(found.branches)) == (1, 3)


def test_no_more_branches_of_a_side_than_asked_for() -> None:
    language = tiny_refiner.language()
    many = Preference("hello", "no", tuple("abc"), tuple("defg"))
    found = tree(many, language, 2, random.Random(0))
    assert (found.chosen, len(found.branches)) == (2, 4)


def test_batches_hold_every_short_tree_once_and_no_long_one() -> None:
    trees = [Tree([1] * size, [[2, 3], [4]], 1) for size in (3, 30, 5, 9, 7, 4)]
    batches = tree_batches(trees, tokens_per_batch=20, longest=20, rng=random.Random(1))
    assert sorted(index for batch in batches for index in batch) == [0, 2, 3, 4, 5]
    for batch in batches:
        assert len(batch) * max(trees[index].tokens for index in batch) <= 20


def test_before_training_nothing_is_preferred() -> None:
    batch = collate_trees([Tree([1], [[2], [3]], 1)])
    start = torch.tensor([-3.0, -1.0])
    terms = prefer.preference_terms(start, start, batch, beta=0.1, anchor=0.5)
    assert terms["preferred"].item() == pytest.approx(0.6931, abs=1e-4)  # ln 2
    assert terms["anchor"].item() == pytest.approx(1.5)
    led = prefer.preference_terms(
        start + torch.tensor([1.0, -1.0]), start, batch, beta=0.1, anchor=0.5
    )
    # -log sigmoid(0.1 * 2)
    assert led["preferred"].item() == pytest.approx(0.5981, abs=1e-4)


def test_the_anchor_counts_a_chosen_rewrite_once() -> None:
    batch = collate_trees([Tree([1], [[2, 3], [3], [4]], 1)])
    found = torch.tensor([-4.0, -9.0, -9.0])
    terms = prefer.preference_terms(found, found, batch, beta=0.1, anchor=1.0)
    assert terms["anchor"].item() == pytest.approx(2.0)  # 4 over two tokens


def test_a_run_leads_the_chosen_rewrites_ahead(refiner: Refiner, tmp_path: Path) -> None:
    trainer = PreferTrainer(
        refiner, preferences(12), tiny_refiner.language(), SETTINGS, device="cpu"
    )
    before = trainer.order()
    assert before["lead has grown"] == 0
    trainer.run(tmp_path / "training.pt", save_every=1000)
    after = trainer.order()
    assert after["lead has grown"] == 1
    assert after["likelier per token"] >= before["likelier per token"]


def test_an_interrupted_run_goes_on(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    def trainer() -> PreferTrainer:
        refiner, _ = load_refiner(checkpoint, base)
        settings = replace(SETTINGS, epochs=2)
        return PreferTrainer(refiner, preferences(12), tiny_refiner.language(), settings, "cpu")

    whole = trainer()
    whole.run(tmp_path / "whole.pt", save_every=1000)

    class Interrupted(Exception):
        pass

    cut = trainer()
    step = cut.train_step

    def until(*arguments: Any) -> dict[str, float]:
        if cut.step == whole.steps // 2:
            raise Interrupted
        return step(*arguments)

    cut.train_step = until  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        cut.run(tmp_path / "cut.pt", save_every=1)
    resumed = trainer()
    resumed.run(tmp_path / "cut.pt", save_every=1000)
    assert resumed.step == whole.steps
    for a, b in zip(whole.deltas, resumed.deltas, strict=True):
        torch.testing.assert_close(a, b)


def invoke(*options: object) -> Any:
    app = typer.Typer()
    app.command()(prefer.main)
    return CliRunner().invoke(app, [str(option) for option in options])


def test_the_command_writes_a_checkpoint_that_says_how_it_was_made(
    checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data", *(row(n) for n in range(6)), row(6, may_train=False))
    out = tmp_path / "preferred"
    options = ["--checkpoint", checkpoint, "--base", base, "--data", data, "--out", out]
    result = invoke(*options, "--epochs", 1, "--held-out", 2, "--save-every", 1)
    assert result.exit_code == 0, result.output
    made, description = load_refiner(out, base)
    told = description["provenance"]["preferences"]
    assert (told["rows trained on"], told["rows held out"], told["settings"]["epochs"]) == (4, 2, 1)
    assert told["held out, after"]["pairs"] == 4
    before, _ = load_refiner(checkpoint, base)
    changed = [
        not torch.equal(a, b)
        for (name, a), b in zip(
            made.state_dict().items(), before.state_dict().values(), strict=True
        )
        if name.endswith(".b")
    ]
    assert changed and all(changed)
    more = write(tmp_path / "more", row(7))
    for other in (["--epochs", 2], ["--data", more], ["--checkpoint", out]):
        again = invoke(*options, "--epochs", 1, "--held-out", 2, "--save-every", 1, *other)
        assert again.exit_code == 2, other
        assert "was written with other settings, rows or start" in again.output.replace("\n", " ")


def test_nothing_need_be_held_out(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data", row(0), row(1))
    options = ["--checkpoint", checkpoint, "--base", base, "--data", data, "--out", tmp_path / "o"]
    result = invoke(*options, "--epochs", 1, "--held-out", 0)
    assert result.exit_code == 0, result.output
    told = load_refiner(tmp_path / "o", base)[1]["provenance"]["preferences"]
    assert (told["rows trained on"], told["rows held out"]) == (2, 0)


def test_rows_that_are_all_too_long_are_said(
    checkpoint: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefer, "PreferSettings", partial(PreferSettings, longest=3))
    data = write(tmp_path / "data", row(0), row(1))
    options = ["--checkpoint", checkpoint, "--base", base, "--data", data, "--out", tmp_path / "o"]
    result = invoke(*options, "--held-out", 1)
    assert result.exit_code == 2
    assert "every row has more than 3 tokens" in " ".join(result.output.split())


@pytest.mark.parametrize("junk", [True, False])
def test_another_base_than_the_refiner_s_is_refused(
    checkpoint: Path, base: Path, tmp_path: Path, junk: bool
) -> None:
    data = write(tmp_path / "data", row(0), row(1))
    other = tmp_path / "other.gguf"
    other.write_bytes(b"no GGUF file" if junk else base.read_bytes() + b" ")
    options = ["--checkpoint", checkpoint, "--base", other, "--data", data, "--out", tmp_path / "o"]
    result = invoke(*options, "--held-out", 0)
    assert result.exit_code == 2
    assert "was trained" in result.output


def test_too_few_preferences_to_hold_some_out_is_wrong_usage(
    checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data", row(0), row(1))
    options = ["--checkpoint", checkpoint, "--base", base, "--data", data, "--out", tmp_path / "o"]
    result = invoke(*options, "--held-out", 2)
    assert result.exit_code == 2
    assert "there are 2 preferences, and 2 are held out" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": []}, "row q0: chosen and rejected must be lists of texts"),
        ({"rejected": ["a", " "]}, "row q0: chosen and rejected must be lists of texts"),
        ({"rejected": None}, "row q0: chosen and rejected must be lists of texts"),
        ({"chosen": "cake"}, "row q0: chosen and rejected must be lists of texts"),
        ({"chosen": 5}, "row q0: chosen and rejected must be lists of texts"),
        ({"prompt": None}, "row q0: prompt must be a text"),
        ({"critique": 3}, "row q0: critique must be a text"),
        ({"chosen": ["kill 0"]}, "row q0: 'kill 0' is chosen and rejected"),
    ],
)
def test_a_row_that_prefers_nothing_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences([write(tmp_path / "data", row(0, **changes))])


def test_a_folder_without_preferences_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no preferences/train\.jsonl with rows to train on"):
        load_preferences([write(tmp_path / "data", row(0, may_train=False))])
