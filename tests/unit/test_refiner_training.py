"""Low-rank deltas, refinement records, and a whole run: train, export, pull, refine."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch", reason="needs torch (the train extra)")
pytest.importorskip("transformers", reason="needs transformers (the train extra)")
pytest.importorskip("gguf", reason="needs gguf (the dev extra)")

import tiny_refiner
import typer
from typer.testing import CliRunner

import lance_edge
from lance_edge.bundle import open_bundle
from lance_edge.errors import BundleError, ExportError, ParityError
from lance_edge.pull import pull
from lance_edge.weights import merge
from lance_edge_export import refiner as exporter
from lance_edge_export.delta import factors
from lance_edge_export.pack import add_refiner
from lance_edge_training import refiner as trainer
from lance_edge_training import second_look
from lance_edge_training.base_model import base_tokenizer, load_base
from lance_edge_training.data import Example
from lance_edge_training.lowrank import LowRank, low_rank_layers
from lance_edge_training.records import (
    IGNORED,
    Composer,
    Record,
    RecordCorpus,
    load_records,
    turns,
)

pytestmark = pytest.mark.train

CATEGORIES = list(tiny.CATEGORIES)


def pair(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"p{number}",
        "kind": "mixed",
        "prompt": f"hello cake {number} and the bomb",
        "severity": {"violence": 0.9, "privacy": 0.3},
        "gradient": {"violence": f"turn bomb {number} to a cake"},
        "refined": f"hello cake {number} and the cake",
        "action": "rewrite",
        "spans": ["the bomb"],
        "source": "own",
        "licence": "own",
        "may_train": True,
        **changes,
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 12 pairs, one of them not to be trained on, and 8 graded prompts."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pairs").mkdir()
    (folder / "prompts").mkdir()
    rows = [pair(number) for number in range(10)]
    rows.append(pair(10, may_train=False))
    rows.append(pair(11, action="keep", severity={}, gradient={}, spans=[], refined=""))
    for name in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "pairs" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    words = ["the spy", "hello cake", "the bomb", "kill safely"] * 8
    prompts = [
        {
            "id": f"g{number}",
            "prompt": f"{text} {number}",
            "source": "coconot" if number % 2 else "own",
            "may_train": True,
            "severity": {"privacy": 0.8} if "spy" in text else {},
        }
        for number, text in enumerate(words)
    ]
    for name in ("train", "dev"):
        with gzip.open(folder / "prompts" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in prompts)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_refiner.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with gradients and a refiner, whose first look the trainer reads."""
    return tiny_refiner.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def run(data: Path, base: Path, bundle: Path, out: Path, *options: str) -> None:
    app = typer.Typer()
    app.command()(trainer.main)
    folders = ["--base", str(base), "--data", str(data), "--out", str(out), "--bundle", str(bundle)]
    result = CliRunner().invoke(app, [*folders, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def checkpoint(
    data: Path, base: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A short run from start to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(data, base, bundle, out, "--epochs", "2", "--prompt-share", "1.0")
    return out


def corpus(data: Path, seed: int = 1, prompt_share: float = 1.0) -> RecordCorpus:
    pairs, prompts = load_records([data], CATEGORIES)
    composer = Composer(
        tiny_refiner.TEMPLATES, CATEGORIES, [0.5] * len(CATEGORIES), tiny_refiner.language()
    )
    return RecordCorpus(pairs, prompts, composer, 400, 480, prompt_share, seed)


def test_a_fresh_delta_changes_nothing_and_a_trained_one_adds_its_product() -> None:
    linear = torch.nn.Linear(6, 4, bias=False)
    layer = LowRank(linear, rank=2, scale=3.0)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), linear(x))
    layer.b.data.normal_()
    expected = x @ (linear.weight + 3.0 * layer.b @ layer.a).T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["a", "b"]


def test_only_the_upper_blocks_get_deltas(base: Path) -> None:
    settings = replace(trainer.RefinerSettings(), first_layer=1)
    refiner = trainer.Refiner(load_base(base), len(CATEGORIES), settings)
    names = set(low_rank_layers(refiner.network))
    assert names == {f"model.layers.1.{name}" for name in tiny_refiner.LINEARS}


def test_int8_factors_have_the_delta_s_product() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((4, 24)), 10 * rng.standard_normal((32, 4))
    b[:, 0] *= 50  # a component that dwarfs the others
    trained = {"model.layers.3.mlp.up_proj.a": a, "model.layers.3.mlp.up_proj.b": b}
    found = factors({name: value.astype(np.float32) for name, value in trained.items()})
    product = merge(np.zeros((32, 24), np.float32), found, "3.mlp.up_proj")
    assert np.linalg.norm(product - b @ a) < 0.02 * np.linalg.norm(b @ a)
    assert found["3.mlp.up_proj.a"].dtype == found["3.mlp.up_proj.b"].dtype == np.int8


def test_records_that_may_not_be_trained_on_are_left_out(data: Path) -> None:
    pairs, prompts = load_records([data], CATEGORIES)
    assert [record.refined for record in pairs] == [
        f"hello cake {n} and the cake" for n in range(10)
    ]
    texts = [record.example.prompt for record in prompts]
    assert not any("10" in text for text in texts if text.startswith("hello cake 10"))
    assert "hello cake 3 and the cake" in texts  # a rewrite is its prompt's benign twin
    assert "hello cake 11 and the bomb" in texts  # to be kept: it teaches the second look alone


def test_a_sequence_writes_the_rewrite_after_the_critique(data: Path) -> None:
    dealt = corpus(data)
    tokens = tiny_refiner.language()
    rows = [row for rows in dealt.batches(0) for row in rows]
    written = [(index, row) for index, row in rows if dealt.records[index].refined is not None]
    assert len(written) == 10
    for index, row in written:
        record = dealt.records[index]
        assert tokens.decode(row.ids[row.written : -1]) == record.refined
        assert row.ids[-1] == tokens.end
        read = tokens.before_critique(tokens.encode(record.example.prompt))
        assert row.ids[: row.read + 1] == read
    batch = dealt.collate(written[:3], random.Random(0))
    for line, (_, row) in enumerate(written[:3]):
        targets = batch.targets[line]
        assert targets[targets != IGNORED].tolist() == row.ids[row.written :]
        assert batch.read[line] == row.read


@pytest.mark.parametrize(
    ("prompt", "written", "expected"),
    [
        ("a b c .", "a b c .", []),  # copied to the end
        ("a b c .", "a x c .", [1]),  # the first token of the edit, not the return to the prompt
        ("a b c .", "x a b c .", [0]),
        ("a b c .", "a c .", [1]),  # a deletion shows in the token after it
        ("a b c .", "x y .", [0]),
        ("a b .", "a b c d .", [2]),
    ],
)
def test_a_rewrite_turns_where_it_leaves_the_prompt(
    prompt: str, written: str, expected: list[int]
) -> None:
    ids = {token: index for index, token in enumerate("abcdxy.")}
    assert turns([ids[t] for t in prompt.split()], [ids[t] for t in written.split()]) == expected


def test_turns_count_as_often_as_the_settings_say(data: Path, base: Path) -> None:
    dealt = corpus(data)
    written = [
        row
        for rows in dealt.batches(0)
        for row in rows
        if dealt.records[row[0]].refined is not None
    ]
    batch = dealt.collate(written, random.Random(0))
    assert batch.turning.any()
    assert (batch.targets[batch.turning] != IGNORED).all()

    def loss(turn_weight: float, batch: Any) -> float:
        torch.manual_seed(0)
        settings = trainer.RefinerSettings(turn_weight=turn_weight)
        with torch.inference_mode():
            made = trainer.Refiner(load_base(base), len(CATEGORIES), settings)
            return float(made.eval()(batch)[0])

    only_turns = replace(
        batch, targets=torch.where(batch.turning, batch.targets, torch.tensor(IGNORED))
    )
    plain, heavy, turning = loss(1.0, batch), loss(1e6, batch), loss(1.0, only_turns)
    assert heavy == pytest.approx(turning, rel=1e-3)
    assert heavy != pytest.approx(plain, rel=1e-3)


def test_a_run_may_start_from_the_weights_of_another(
    data: Path, base: Path, bundle: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(data, base, bundle, first, "--epochs", "1", "--save-every", "1")
    options = ("--epochs", "1", "--steps", "1", "--delta-rate", "0", "--save-every", "1")
    run(data, base, bundle, second, *options, "--start", str(first / "training.pt"))
    before, after = (exporter.load_file(f / "delta.safetensors") for f in (first, second))
    assert all(np.allclose(before[name], after[name]) for name in before)
    provenance = json.loads((second / "refiner.json").read_text())["provenance"]
    assert provenance["started_from"]["settings"]["epochs"] == 1


def test_batches_follow_from_seed_and_epoch(data: Path) -> None:
    def ids(seed: int, epoch: int) -> list[list[int]]:
        return [row.ids for rows in corpus(data, seed).batches(epoch) for _, row in rows]

    assert ids(1, 0) == ids(1, 0)
    assert ids(1, 0) != ids(1, 1)
    assert ids(1, 0) != ids(2, 0)
    fewer = sum(len(rows) for rows in corpus(data, prompt_share=0.0).batches(0))
    assert fewer == 10


def test_the_three_kinds_of_critique() -> None:
    composer = Composer(
        tiny_refiner.TEMPLATES, CATEGORIES, [0.5] * len(CATEGORIES), tiny_refiner.language()
    )
    example = Example(
        "say hello to the bomb",
        "own",
        "mixed",
        {},
        {"violence": 0.9, "privacy": 0.4},
        True,
        spans=("the bomb",),
    )
    record = Record(example, {"violence": "turn it to a cake"}, "say hello to the cake")
    graded = composer.critique(record, "graded").splitlines()
    own = composer.critique(record, "own").splitlines()
    assert graded == [
        'violence (extreme) in "the bomb": no violence',
        "privacy (faint): no privacy",
    ]
    assert own[0] == 'violence (extreme) in "the bomb": turn it to a cake'
    assert composer.critique(record, "predicted") == composer.critique(record, "graded")


def test_a_run_lowers_the_loss_and_goes_on_after_an_interruption(
    data: Path, base: Path, bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "resumed"
    options = ("--epochs", "2", "--prompt-share", "1.0", "--save-every", "1")
    original = trainer.RefinerTrainer.train_step
    calls = 0

    def interrupted(self: trainer.RefinerTrainer, batch: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.RefinerTrainer, "train_step", interrupted)
        with pytest.raises((KeyboardInterrupt, AssertionError)):
            run(data, base, bundle, out, *options)
    assert not (out / "delta.safetensors").exists()
    run(data, base, bundle, out, *options)
    whole = exporter.load_file(checkpoint / "delta.safetensors")
    resumed = exporter.load_file(out / "delta.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(np.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)
    assert any(np.abs(value).max() > 0 for name, value in whole.items() if name.endswith(".b"))


def test_other_settings_do_not_go_on_from_a_checkpoint(
    data: Path, base: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "settings"
    run(data, base, bundle, out, "--epochs", "1", "--steps", "2", "--save-every", "1")
    app = typer.Typer()
    app.command()(trainer.main)
    folders = ["--base", str(base), "--data", str(data), "--out", str(out), "--bundle", str(bundle)]
    result = CliRunner().invoke(app, [*folders, "--epochs", "3"])
    assert result.exit_code == 2
    assert "other settings" in result.output


def test_the_base_s_tokenizer_is_the_one_its_metadata_describe(base: Path) -> None:
    made = base_tokenizer(base)
    text = "hello the 12 cakes, naïve <|im_end|>"
    assert made.encode(text).ids == tiny_refiner.tokenizer().encode(text).ids


@pytest.fixture(scope="module")
def refined_bundle(
    data: Path, base: Path, bundle: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny bundle with the trained refiner in it, exported."""
    samples = [("hello the bomb", "no violence", "hello the cake")] * 3
    with pytest.MonkeyPatch.context() as patch:
        # A network of random weights is unsure of every token: int8 decides other ones.
        patch.setattr(exporter, "LEAST_AGREEMENT", {"fp32": 0.999, "int8": 0.0})
        patch.setattr(exporter, "CONTEXT", tiny_refiner.CONTEXT)
        patch.setattr(exporter, "PROMPT_TOKENS", tiny_refiner.PROMPT_TOKENS)
        exported = exporter.export_refiner(
            checkpoint,
            base,
            tiny_refiner.PACKAGE,
            tiny_refiner.MEMBER,
            tiny.CATEGORIES,
            least_kept=0.5,
            least_known=0.25,
            least_log_probability=-30.0,
            samples=samples,
            workspace=tmp_path_factory.mktemp("stages"),
        )
    out = tmp_path_factory.mktemp("exported") / "bundle"
    gradients = (bundle / "gradients.json").read_bytes()
    add_refiner(open_bundle(bundle), out, "2", exported, gradients)
    return out


def test_an_exported_refiner_is_pulled_and_refines(
    refined_bundle: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path))
    opened = open_bundle(refined_bundle)
    assert opened.manifest.version == "2"
    assert opened.manifest.parity["refiner fp32"]["agreement"] >= 0.999
    assert opened.manifest.refiner is not None
    assert opened.manifest.refiner.least_known == 0.25
    assert opened.least_log_probability == -30.0
    weights = pull(opened, base)
    assert weights.stat().st_size == opened.manifest.refiner.weights.bytes  # type: ignore[union-attr]
    with lance_edge.load(refined_bundle, "cpu") as guard:
        verdict = guard.refine("hello the bomb")
        assert verdict.steps and verdict.critique == verdict.steps[0].critique
        assert guard.refine("hello").decision == "allow"


def test_an_export_that_changes_too_much_fails(
    checkpoint: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "LEAST_AGREEMENT", {"fp32": 1.01, "int8": 0.0})
    samples = [("hello", "no violence", "hello the cake")]
    with pytest.raises(ParityError, match="next tokens agree"):
        exporter.export_refiner(
            checkpoint, base, "a==1", "b", tiny.CATEGORIES, 0.5, 0.0, None, samples, tmp_path
        )


@pytest.mark.parametrize(
    "categories", [tiny.CATEGORIES[::-1], tiny.CATEGORIES[:2], ("violence", "privacy", "children")]
)
def test_a_refiner_of_other_categories_is_refused(
    checkpoint: Path, base: Path, tmp_path: Path, categories: tuple[str, ...]
) -> None:
    with pytest.raises(ExportError, match="was trained with the categories violence, privacy"):
        exporter.export_refiner(
            checkpoint, base, "a==1", "b", categories, 0.5, 0.0, None, [], tmp_path
        )


def test_a_package_is_a_name_and_a_version(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="name==version, not 'tiny-base'"):
        exporter.export_refiner(
            checkpoint, base, "tiny-base", "b", tiny.CATEGORIES, 0.5, 0.0, None, [], tmp_path
        )


def test_the_second_look_is_calibrated_on_the_calibration_half(
    refined_bundle: Path, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path))
    pull(open_bundle(refined_bundle), base)
    out, kept = tmp_path / "second_look.json", tmp_path / "looks.npz"
    second_look.main(refined_bundle, data, out, kept)
    first = json.loads(out.read_text(encoding="utf-8"))
    assert set(first["calibration"]) == set(CATEGORIES)
    assert first["low"] <= first["high"]
    assert first["share"] in second_look.SHARES
    second_look.main(refined_bundle, data, out, kept)  # from the looks that were kept
    assert json.loads(out.read_text(encoding="utf-8")) == first


def rows_of(source: str, harmful: bool, count: int) -> list[Example]:
    return [Example(f"{source} {n}", source, "prompt", {}, None, harmful) for n in range(count)]


def test_the_band_mends_most_while_few_plain_prompts_pay() -> None:
    rows = [
        *rows_of("plain", False, 100),
        *rows_of("catqa", True, 50),
        *rows_of("coconot", False, 9),
    ]
    margin = np.concatenate([np.linspace(-3, -1, 100), np.linspace(-2, 2, 50), np.full(9, -3.0)])
    first = (margin >= 0).astype(float)[:, None]
    right = np.array([[float(example.harmful is True)] for example in rows])
    choice = second_look.choose(first, margin, lambda share: right, np.array([0.5]), rows)
    inside = (margin >= choice.low) & (margin <= choice.high)
    assert inside[:100].mean() <= second_look.PLAIN_SHARE
    mended = (first[100:150, 0] == 0) & inside[100:150]
    assert choice.gain == pytest.approx(mended.mean())
    assert mended.sum() >= 0.5 * (first[100:150] == 0).sum()


def test_a_second_look_that_mends_nothing_is_not_taken() -> None:
    rows = [
        *rows_of("plain", False, 20),
        *rows_of("catqa", True, 20),
        *rows_of("coconot", False, 20),
    ]
    margin = np.linspace(-2, 2, 60)
    first = (margin >= 0).astype(float)[:, None]
    choice = second_look.choose(first, margin, lambda share: first, np.array([0.5]), rows)
    assert choice == second_look.NO_SECOND_LOOK
    assert not ((margin >= choice.low) & (margin <= choice.high)).any()


def test_a_gain_must_hold_on_rows_it_was_not_chosen_on() -> None:
    rows = [
        *rows_of("plain", False, 100),
        *rows_of("catqa", True, 200),
        *rows_of("coconot", False, 200),
    ]
    rng = np.random.default_rng(0)
    margin = rng.uniform(-2, 2, len(rows))
    first = (margin >= 0).astype(float)[:, None]
    truth = np.array([[float(example.harmful is True)] for example in rows])
    noise = rng.integers(0, 2, first.shape).astype(float)
    limit = np.array([0.5])
    by_luck = second_look.choose(first, margin, lambda share: noise, limit, rows)
    assert by_luck.gain > second_look.LEAST_GAIN
    held = [
        second_look.held_out_gain(first, margin, lambda share, s=s: s, limit, rows)
        for s in (noise, truth)
    ]
    assert held[0] < by_luck.gain / 2
    assert held[1] > 0.1


def test_both_sides_count_the_same() -> None:
    rows = [*rows_of("catqa", True, 4), *rows_of("coconot", False, 2), *rows_of("plain", False, 3)]
    weight, wanted = second_look.set_weights(second_look.evaluation_sets(rows), len(rows))
    assert weight.tolist() == [0.25] * 4 + [0.5] * 2 + [0.0] * 3
    assert wanted.tolist() == [True] * 4 + [False] * 5
