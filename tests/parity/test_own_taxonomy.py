"""A team's own categories, from training to a screened prompt: commands and data, no change of code."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch (the export extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the export extra)")
pytest.importorskip("onnxscript", reason="needs onnxscript (the export extra)")

import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from typer.testing import CliRunner

import lance_edge
from lance_edge import cli
from lance_edge_export import cli as export
from lance_edge_training import calibrate
from lance_edge_training import screener as trainer

pytestmark = pytest.mark.train

# Of a bank's help desk: category -> words that only its prompts hold.
TRIGGERS = {
    "investment_advice": ["stocks", "bitcoin", "portfolio", "dividends"],
    "competitors": ["rivalbank", "otherbank", "switching", "competitor"],
    "internal_systems": ["mainframe", "backend", "credentials", "database"],
    "insults": ["idiots", "useless", "scum", "liars"],
    "legal_threats": ["lawyer", "sue", "court", "ombudsman"],
}
FILLERS = "how do i please tell me about the my your account card today now again why is".split()
ROWS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The team's encoder, taxonomy and data; then trained, calibrated and exported by command."""
    home = tmp_path_factory.mktemp("team")
    write_encoder(home / "encoder")
    taxonomy = [
        {"name": name, "title": name.replace("_", " ").title(), "action": action}
        for name, action in zip(
            TRIGGERS, ["rewrite", "rewrite", "block", "advise", "review"], strict=True
        )
    ]
    (home / "taxonomy.json").write_text(json.dumps(taxonomy), encoding="utf-8")
    rng = random.Random(5)
    for split, count in (("train", ROWS), ("dev", 200)):
        write_lines(home / f"data/prompts/{split}.jsonl", [row(rng, n) for n in range(count)])
    write_lines(home / "data/pairs/test.jsonl", [pair(rng, n) for n in range(60)])

    run(
        trainer.main,
        *("--encoder", home / "encoder", "--taxonomy", home / "taxonomy.json"),
        *("--data", home / "data", "--out", home / "trained", "--epochs", 120),
    )
    run(calibrate.main, "--checkpoint", home / "trained", "--data", home / "data")
    run(
        export.screener,
        *("--checkpoint", home / "trained", "--out", home / "bundle", "--precision", "fp32"),
        *("--prompts", home / "data/prompts/dev.jsonl"),
    )
    return home


def test_the_bundle_has_the_teams_categories(folder: Path) -> None:
    with lance_edge.load(folder / "bundle", "cpu") as guard:
        assert list(guard.policy.categories) == list(TRIGGERS)


@pytest.mark.parametrize("category", list(TRIGGERS))
def test_a_prompt_of_each_category_is_flagged_for_it(folder: Path, category: str) -> None:
    first, second = TRIGGERS[category][:2]
    with lance_edge.load(folder / "bundle", "cpu") as guard:
        verdict = guard.screen(f"please tell me now about {first} and {second} again")
        assert list(verdict.flagged) == [category]


def test_a_harmless_prompt_is_allowed(folder: Path) -> None:
    with lance_edge.load(folder / "bundle", "cpu") as guard:
        assert guard.screen("tell me about my account card please").decision == "allow"


def test_the_command_line_screens_with_it(folder: Path) -> None:
    arguments = ["screen", "--text", "--bundle", str(folder / "bundle"), "--format", "jsonl"]
    prompts = ["why is the lawyer in court", "how is my card"]
    result = CliRunner().invoke(cli.app, [*arguments, *prompts])
    assert result.exit_code == 1, result.output
    verdicts = [json.loads(line) for line in result.stdout.splitlines()]
    assert [verdict["decision"] for verdict in verdicts] == ["review", "allow"]
    assert verdicts[0]["flagged"] == ["legal_threats"]


def run(command: Any, *arguments: Any) -> None:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"


def row(rng: random.Random, number: int) -> dict[str, Any]:
    """Every second prompt is of one category; the others are harmless."""
    words = rng.choices(FILLERS, k=rng.randint(3, 6))
    severity = {}
    if number % 2:
        category = rng.choice(list(TRIGGERS))
        words += rng.choices(TRIGGERS[category], k=2)
        rng.shuffle(words)
        severity = {category: 0.8}
    row = {"id": f"r{number}", "prompt": " ".join(words), "source": "desk", "may_train": True}
    return {**row, "harmful": bool(severity), "labels": [], "severity": severity}


def pair(rng: random.Random, number: int) -> dict[str, Any]:
    """A prompt to keep: what thresholds are chosen on."""
    kept = row(rng, 2 * number)
    kept |= {"kind": "hard_benign", "action": "keep", "refined": kept["prompt"]}
    return {**kept, "spans": [], "gradient": {}}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_encoder(folder: Path) -> None:
    """An untrained encoder with a vector for each word above."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [*special, *FILLERS, "and", *(w for found in TRIGGERS.values() for w in found)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
    )
    torch.manual_seed(0)
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    # Training leaves the embeddings as they are, so they must tell the words apart already.
    torch.nn.init.normal_(encoder.embeddings.word_embeddings.weight)
    encoder.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
