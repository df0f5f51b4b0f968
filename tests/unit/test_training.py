"""The head, its objective, and whole runs of the trainer and the calibration on a tiny encoder."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch", reason="needs torch (the train extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the train extra)")

import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lance_edge.bundle import Calibration
from lance_edge.screener import FloatArray
from lance_edge.screener import Screener as RuntimeScreener
from lance_edge.tokenizer import Tokenizer
from lance_edge_training import average, calibrate
from lance_edge_training import screener as trainer
from lance_edge_training.checkpoint import load_screener, new_screener
from lance_edge_training.data import Batch, Example, development_examples
from lance_edge_training.evaluate import Latents, half, latents, torch_session, truth
from lance_edge_training.model import MIN_DEVIATION, Enhancer, Head, Posterior, Reading, Screener
from lance_edge_training.objective import Weights, plain_terms, total, variational_terms

pytestmark = pytest.mark.train

CATEGORIES = list(tiny.CATEGORIES)
HAZARDS = {"bomb": "violence", "spy": "privacy"}
HIDDEN = 32


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of an untrained encoder of two layers."""
    folder = tmp_path_factory.mktemp("encoder")
    words = tiny.tokenizer()
    config = transformers.BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    torch.manual_seed(0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which `bomb` is violence and `spy` privacy; no row is marked `child`."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    coarse = [prompt_row(rng, "coarse", hazard) for hazard in ["bomb", "spy", None] * 8]
    graded = [graded_row(rng) for _ in range(12)]
    banned = [prompt_row(rng, "banned", "bomb", may_train=False) for _ in range(12)]
    write_rows(folder / "prompts" / "train.jsonl.gz", coarse + graded + banned)
    write_rows(folder / "pairs" / "train.jsonl", [pair_row(rng) for _ in range(8)])
    dev = [prompt_row(rng, "coarse", hazard) for hazard in ["bomb", "spy", None] * 10]
    hard = [prompt_row(rng, "coconot") for _ in range(30)]
    write_rows(folder / "prompts" / "dev.jsonl.gz", dev + hard)
    write_rows(folder / "pairs" / "test.jsonl", [pair_row(rng) for _ in range(20)])
    return folder


@pytest.fixture(scope="module")
def taxonomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taxonomy") / "taxonomy.json"
    path.write_text(json.dumps([{"name": n, "title": n, "action": "rewrite"} for n in CATEGORIES]))
    return path


Train = Callable[..., Any]


@pytest.fixture(scope="module")
def train(encoder: Path, data: Path, taxonomy: Path) -> Train:
    """Runs the trainer's command with more arguments."""

    def run(*arguments: object) -> Any:
        given = ["--encoder", encoder, "--data", data, "--taxonomy", taxonomy, *arguments]
        return invoke(trainer.main, *given)

    return run


@pytest.fixture(scope="module")
def trained(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of a few steps; tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    result = train("--out", out, "--epochs", 3)
    assert result.exit_code == 0, result.output
    return out


# The served head


@pytest.mark.parametrize("kind", ["variational", "plain"])
def test_contributions_sum_to_the_mean_without_its_bias(kind: Any) -> None:
    head, states, mask = Head(8, 3, kind), *states_and_mask()
    reading = head(states, mask)
    torch.testing.assert_close(
        reading.contributions.sum(1), reading.labels.mean - head.mean.bias, atol=1e-6, rtol=0
    )


def test_the_mean_is_linear_in_the_pooled_state() -> None:
    head, states, mask = Head(8, 3, "variational"), *states_and_mask()
    reading = head(states, mask)
    pooled = (reading.attention.unsqueeze(-1) * states).sum(1)
    torch.testing.assert_close(reading.pooled, pooled, atol=1e-6, rtol=0)
    torch.testing.assert_close(reading.labels.mean, head.mean(pooled), atol=1e-6, rtol=0)


def test_attention_is_zero_on_padding_and_sums_to_one() -> None:
    states, mask = states_and_mask()
    reading = Head(8, 3, "variational")(states, mask)
    assert torch.equal(reading.attention == 0, mask == 0)
    torch.testing.assert_close(reading.attention.sum(1), torch.ones(2))
    assert torch.equal(reading.contributions[1, 3:], torch.zeros(2, 3))


def test_what_stands_in_padding_does_not_matter() -> None:
    head, states, mask = Head(8, 3, "variational"), *states_and_mask()
    other = torch.where(mask.unsqueeze(-1) == 1, states, 100.0)
    assert torch.equal(head(states, mask).labels.mean, head(other, mask).labels.mean)
    assert torch.equal(head(states, mask).labels.deviation, head(other, mask).labels.deviation)


def test_the_plain_head_has_no_deviation() -> None:
    states, mask = states_and_mask()
    assert torch.equal(Head(8, 3, "plain")(states, mask).labels.deviation, torch.zeros(2, 3))
    assert (Head(8, 3, "variational")(states, mask).labels.deviation > MIN_DEVIATION).all()


# The posterior


def test_a_posterior_that_learned_nothing_says_what_the_prior_says() -> None:
    reading, enhancer = read(), Enhancer(8, 3)
    torch.nn.init.zeros_(enhancer.encode[-1].weight)
    torch.nn.init.zeros_(enhancer.encode[-1].bias)
    posterior = enhance(enhancer, reading, torch.ones(2, 3), torch.ones(2, 3))
    assert torch.equal(posterior.labels.mean, reading.labels.mean)


def test_the_posterior_sees_only_observed_labels() -> None:
    reading, enhancer = read(), Enhancer(8, 3)
    observed = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    told = enhance(enhancer, reading, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), observed)
    same = enhance(enhancer, reading, torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]), observed)
    other = enhance(enhancer, reading, torch.zeros(2, 3), observed)
    assert torch.equal(same.labels.mean, told.labels.mean)
    assert (other.labels.mean[0] != told.labels.mean[0]).all()


def test_the_posterior_teaches_the_encoder_through_the_pooled_state_alone(encoder: Path) -> None:
    screener = new_screener(encoder, 3, "variational")
    reading = screener(torch.tensor([[2, 4, 3], [2, 6, 3]]), torch.ones(2, 3, dtype=torch.long))
    posterior = enhance(Enhancer(HIDDEN, 3), reading, torch.ones(2, 3), torch.ones(2, 3))
    (posterior.label_sample.sum() + posterior.reconstruction.sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained_layers(screener))
    assert screener.head.pool.weight.grad.abs().max() > 0
    # The prior is a target here; it learns from its own terms.
    assert screener.head.mean.weight.grad is None
    assert screener.head.deviation.weight.grad is None


# The objective


def test_terms_of_the_variational_head_are_named_finite_and_weighted() -> None:
    plain = variational(Weights(**{field.name: 1.0 for field in fields(Weights)}))
    assert set(plain) == {field.name for field in fields(Weights)}
    assert all(torch.isfinite(value) and value > 0 for value in plain.values())
    weights = Weights(*[0.5 * (n + 1) for n in range(len(fields(Weights)))])
    weighted = variational(weights)
    for name, value in plain.items():
        assert weighted[name].item() == pytest.approx(getattr(weights, name) * value.item())


def test_terms_of_the_plain_head_are_named_finite_and_weighted() -> None:
    reading, batch = read("plain"), mixed_batch()
    plain = plain_terms(reading, batch, Weights(label=1, severity=1, harmful=1, span=1))
    assert set(plain) == {"label", "severity", "harmful", "span"}
    assert all(torch.isfinite(value) and value > 0 for value in plain.values())
    weighted = plain_terms(reading, batch, Weights(label=2, severity=3, harmful=4, span=5))
    for factor, name in enumerate(("label", "severity", "harmful", "span"), 2):
        assert weighted[name].item() == pytest.approx(factor * plain[name].item())


def test_the_loss_is_the_sum_of_its_terms() -> None:
    terms = variational(Weights())
    assert total(terms).item() == pytest.approx(sum(value.item() for value in terms.values()))


def test_divergences_are_annealed_from_zero() -> None:
    start, middle, end = (variational(Weights(), anneal) for anneal in (0.0, 0.25, 1.0))
    for name in ("kl_label", "kl_content"):
        assert start[name] == 0
        assert middle[name].item() == pytest.approx(0.25 * end[name].item())
    assert start["label"] == end["label"]


def test_each_row_is_judged_by_the_truth_it_has() -> None:
    """Graded rows by their severities, coarse rows by the labels that their source speaks of."""
    batch, reading = mixed_batch(), read("plain")
    graded, coarse = reading.labels.mean.double()  # the batch's two rows
    terms = plain_terms(reading, batch, Weights())
    severity = torch.nn.functional.binary_cross_entropy_with_logits(
        graded, torch.tensor([0.8, 0.3, 0.0]).double(), reduction="sum"
    )
    label = torch.nn.functional.softplus(-coarse[1])  # only the second category is observed
    assert terms["severity"].item() == pytest.approx(severity.item() / 2)
    assert terms["label"].item() == pytest.approx(label.item() / 2)


def test_shrinking_the_pooled_state_does_not_pay() -> None:
    """The reconstruction's target is fixed: its gradient reaches h only as the posterior's input."""
    reading = read()
    pooled = reading.pooled.detach().requires_grad_()
    enhancer = Enhancer(8, 3)
    for layer in (enhancer.encode[-1], enhancer.decode[0]):
        torch.nn.init.zeros_(layer.weight)
    terms = variational_terms(
        replace(reading, pooled=pooled), enhancer, mixed_batch(), Weights(), anneal=1.0
    )
    (gradient,) = torch.autograd.grad(terms["reconstruction"], pooled)
    assert torch.equal(gradient, torch.zeros(2, 8))


# Runs of the trainer


def test_training_lowers_the_loss(train: Train, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[float] = []
    step = trainer.Trainer.train_step

    def recorded(self: trainer.Trainer, batch: Batch) -> dict[str, float]:
        terms = step(self, batch)
        seen.append(terms["label"] + terms["severity"] + terms["harmful"])
        return terms

    monkeypatch.setattr(trainer.Trainer, "train_step", recorded)
    assert train("--out", tmp_path, "--epochs", 10).exit_code == 0
    assert np.mean(seen[-2:]) < 0.85 * np.mean(seen[:2])


def test_a_resumed_run_ends_with_the_same_weights(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped after five steps, it goes on from the checkpoint after three, inside an epoch."""
    arguments = ("--out", tmp_path, "--epochs", 3, "--save-every", 3)
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "train_step", interrupted_after(5))
        assert isinstance(train(*arguments).exception, Interrupted)
    assert not (tmp_path / "model.safetensors").exists()
    steps: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "train_step", recording(steps))
        assert train(*arguments).exit_code == 0
    assert steps == [3, 4, 5]
    for name in ("model.safetensors", "head.safetensors"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("change", [("--epochs", 4), ("--seed", 18), ("--head", "plain")])
def test_resuming_with_other_settings_is_refused(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: Any, change: tuple[str, object]
) -> None:
    arguments = ("--out", tmp_path, "--epochs", 3, "--save-every", 1)
    monkeypatch.setattr(trainer.Trainer, "train_step", interrupted_after(2))
    train(*arguments)
    saved = (tmp_path / "training.pt").read_bytes()
    result = train(*arguments, *change)
    assert result.exit_code == 2
    assert "was written with other settings, rows or start; give them again" in unframed(
        result.output
    )
    assert (tmp_path / "training.pt").read_bytes() == saved


def test_another_seed_gives_other_weights(train: Train, trained: Path, tmp_path: Path) -> None:
    assert train("--out", tmp_path, "--epochs", 3, "--seed", 18).exit_code == 0
    name = "head.safetensors"
    assert (tmp_path / name).read_bytes() != (trained / name).read_bytes()


def test_a_run_may_start_from_the_weights_of_another(
    train: Train, tmp_path: Path, monkeypatch: Any
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train("--out", first, "--epochs", 1, "--save-every", 1).exit_code == 0
    begun: list[dict[str, torch.Tensor]] = []
    step = trainer.Trainer.train_step

    def recorded(self: trainer.Trainer, batch: Batch) -> dict[str, float]:
        assert self.enhancer is not None
        modules = {"screener": self.screener, "enhancer": self.enhancer}
        begun.append({k: v for m in modules for k, v in _named(m, modules[m])})
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", recorded)
    options = ("--epochs", 1, "--encoder-rate", 1e-5, "--seed", 18)
    assert train("--out", second, *options, "--start", first / "training.pt").exit_code == 0
    saved = torch.load(first / "training.pt", weights_only=True)
    for name in ("screener", "enhancer"):
        for key, value in saved[name].items():
            assert torch.equal(begun[0][f"{name}.{key}"], value), key
    provenance = json.loads((second / "screener.json").read_text())["provenance"]
    assert provenance["settings"]["encoder_rate"] == 1e-5
    assert provenance["started_from"]["settings"]["epochs"] == 1


def test_what_a_run_cannot_start_from_is_wrong_usage(
    train: Train, tmp_path: Path, monkeypatch: Any
) -> None:
    plain = tmp_path / "plain"
    assert train("--out", plain, "--epochs", 1, "--head", "plain", "--save-every", 1).exit_code == 0
    (tmp_path / "text.pt").write_text("no network", encoding="utf-8")
    for start, message in (
        (plain / "training.pt", "of another kind of run: it has no enhancer"),
        (tmp_path / "text.pt", "is not what such a run leaves"),
        (tmp_path / "missing.pt", "is not what such a run leaves"),
    ):
        result = train("--out", tmp_path / "out", "--epochs", 1, "--start", start)
        assert result.exit_code == 2
        assert message in unframed(result.output)


def test_resuming_from_another_start_is_refused(
    train: Train, tmp_path: Path, monkeypatch: Any
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train("--out", first, "--epochs", 1, "--save-every", 1).exit_code == 0
    assert train("--out", second, "--epochs", 1, "--save-every", 1).exit_code == 0
    again = train("--out", second, "--epochs", 1, "--start", first / "training.pt")
    assert again.exit_code == 2
    assert "was written with other settings" in unframed(again.output)


def unframed(output: str) -> str:
    """An error's words, without the frame around them."""
    return " ".join(output.replace("│", " ").split())


def _named(name: str, module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(f"{name}.{key}", value.clone()) for key, value in module.state_dict().items()]


def test_the_checkpoint_says_what_it_was_made_from(trained: Path) -> None:
    description = json.loads((trained / "screener.json").read_text())
    assert (description["head"], description["window"], description["overlap"]) == (
        "variational",
        128,
        32,
    )
    provenance = description["provenance"]
    assert provenance["settings"] == asdict(trainer.Settings(epochs=3))
    assert provenance["weights"] == asdict(Weights())
    assert provenance["rows"] == 24 + 12 + 2 * 8  # a pair gives its prompt and its rewrite
    assert provenance["sources"] == ["coarse", "graded", "own"]  # none that may not be trained on


def test_the_embeddings_stay_as_pretrained(trained: Path, encoder: Path) -> None:
    before = new_screener(encoder, 3, "variational").encoder
    after = load_screener(trained)[0].encoder
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    changed = [
        not torch.equal(old, new)
        for old, new in zip(before.encoder.parameters(), after.encoder.parameters(), strict=True)
    ]
    assert all(changed)


def test_the_plain_ablation_runs(train: Train, tmp_path: Path) -> None:
    assert train("--out", tmp_path, "--epochs", 1, "--head", "plain").exit_code == 0
    screener, description = load_screener(tmp_path)
    assert description["head"] == "plain"
    reading = screener(torch.tensor([[2, 4, 3]]), torch.ones(1, 3, dtype=torch.long))
    assert torch.equal(reading.labels.deviation, torch.zeros(1, 3))


def test_the_binary_ablation_sees_no_severities(
    train: Train, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    settings = trainer.Settings(supervision="binary")
    examples = trainer.dealt_examples([data], CATEGORIES, settings)
    assert {example.severity is None for example in examples} == {True}
    seen: list[Batch] = []
    step = trainer.Trainer.train_step

    def recorded(self: trainer.Trainer, batch: Batch) -> dict[str, float]:
        seen.append(batch)
        return step(self, batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", recorded)
    assert train("--out", tmp_path, "--epochs", 1, "--supervision", "binary").exit_code == 0
    assert sum(batch.graded.sum().item() for batch in seen) == 0
    assert sum(batch.coarse.sum().item() for batch in seen) > 0


@pytest.mark.parametrize("option", [("--head", "bayesian"), ("--supervision", "weak")])
def test_unknown_ablations_are_refused(train: Train, tmp_path: Path, option: Any) -> None:
    result = train("--out", tmp_path, *option)
    assert result.exit_code == 2
    assert "--head is variational or plain" in plain_text(result)


def test_fewer_rows_are_drawn_with_the_seed(data: Path) -> None:
    def drawn(seed: int) -> list[Example]:
        return trainer.dealt_examples([data], CATEGORIES, trainer.Settings(rows=10, seed=seed))

    assert len(drawn(1)) == 10
    assert drawn(1) == drawn(1) != drawn(2)


def test_training_on_no_rows_says_so(encoder: Path, taxonomy: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts" / "train.jsonl.gz", [])
    write_rows(tmp_path / "pairs" / "train.jsonl", [])
    given = ["--encoder", encoder, "--taxonomy", taxonomy, "--data", tmp_path]
    result = invoke(trainer.main, *given, "--out", tmp_path / "run")
    assert result.exit_code != 0
    assert "no rows" in f"{result.exception} {plain_text(result)}"


# Averages


@pytest.fixture
def other(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint whose head's weights are larger by 1."""
    folder = shutil.copytree(trained, tmp_path / "other")
    head = {name: value + 1 for name, value in load_file(folder / "head.safetensors").items()}
    save_file(head, folder / "head.safetensors")
    return folder


def test_an_average_lies_between_two_checkpoints(
    trained: Path, other: Path, tmp_path: Path
) -> None:
    result = invoke(average.main, trained, other, "--out", tmp_path / "out", "--share", 0.25)
    assert result.exit_code == 0, result.output
    screener, description = load_screener(tmp_path / "out")
    first, before = load_screener(trained)
    for name, value in screener.head.state_dict().items():
        torch.testing.assert_close(value, first.head.state_dict()[name] + 0.25)
    for name, value in screener.encoder.state_dict().items():
        torch.testing.assert_close(value, first.encoder.state_dict()[name])
    assert description["provenance"]["share"] == 0.25
    assert description["provenance"]["first"] == before["provenance"]
    assert description["window"] == before["window"]


@pytest.mark.parametrize("what", ["window", "taxonomies", "network"])
def test_checkpoints_that_differ_are_not_averaged(
    trained: Path, other: Path, tmp_path: Path, what: str
) -> None:
    if what == "window":
        change_json(other / "screener.json", lambda values: {**values, "window": 999})
    elif what == "taxonomies":
        change_json(other / "taxonomy.json", lambda entries: entries[::-1])
    else:
        change_json(other / "config.json", lambda config: {**config, "num_hidden_layers": 0})
        weights = load_file(other / "model.safetensors")
        kept = {name: w for name, w in weights.items() if ".layer." not in name}
        save_file(kept, other / "model.safetensors", {"format": "pt"})
    result = invoke(average.main, trained, other, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"differ in their {what}" in " ".join(plain_text(result).replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_averaged(trained: Path, other: Path, tmp_path: Path) -> None:
    change_json(other / "config.json", lambda config: {**config, "num_hidden_layers": 0})
    result = invoke(average.main, trained, other, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "of which" in plain_text(result)


def test_an_average_does_not_replace_its_parts(trained: Path, other: Path) -> None:
    result = invoke(average.main, trained, other, "--out", other)
    assert result.exit_code == 2
    assert "is one of the two" in " ".join(plain_text(result).replace("│", " ").split())


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# Calibration


def test_the_calibration_of_a_miscalibrated_latent_is_found(monkeypatch: Any) -> None:
    monkeypatch.setattr(calibrate, "PRIOR_WEIGHT", 0.0)
    latent, slope, intercept = miscalibrated()
    target = latent.severity(slope, intercept)
    found_slope, found_intercept = calibrate.fit(latent, target, np.ones_like(target))
    np.testing.assert_allclose(found_slope, slope, rtol=1e-3)
    np.testing.assert_allclose(found_intercept, intercept, atol=1e-3)


def test_the_pull_towards_no_calibration_is_weak() -> None:
    latent, slope, intercept = miscalibrated()
    target = latent.severity(slope, intercept)
    found_slope, found_intercept = calibrate.fit(latent, target, np.ones_like(target))
    shortfall = np.concatenate([np.log(slope) / np.log(found_slope), intercept / found_intercept])
    assert ((shortfall > 1) & (shortfall < 1.15)).all()
    fitted = latent.severity(found_slope, found_intercept)
    assert (cross_entropy(fitted, target) < cross_entropy(latent.severity(), target)).all()


def test_a_calibrated_latent_is_left_as_it_is() -> None:
    latent, _, _ = miscalibrated()
    target = latent.severity()
    slope, intercept = calibrate.fit(latent, target, np.ones_like(target))
    np.testing.assert_allclose(slope, 1, atol=1e-3)
    np.testing.assert_allclose(intercept, 0, atol=1e-3)


def test_unknown_cells_do_not_count_in_the_fit() -> None:
    latent, slope, intercept = miscalibrated()
    target = latent.severity(slope, intercept)
    known = (np.arange(len(target)) % 2).repeat(2).reshape(-1, 2).astype(float)
    expected = calibrate.fit(latent, target, known)
    found = calibrate.fit(latent, np.where(known == 1, target, 1 - target), known)
    np.testing.assert_allclose(found, expected)


def test_a_category_that_no_row_knows_stays_uncalibrated() -> None:
    latent, slope, intercept = miscalibrated()
    target = latent.severity(slope, intercept)
    known = np.ones_like(target) * [1, 0]
    found_slope, found_intercept = calibrate.fit(latent, target, known)
    assert found_slope == pytest.approx([slope[0], 1], rel=0.06)
    assert found_intercept == pytest.approx([intercept[0], 0], abs=0.08)


def test_thresholds_flag_the_stated_share_of_each_set_alike() -> None:
    examples = [hard_benign("own", "hard_benign")] * 10 + [hard_benign("coconot", "prompt")] * 2
    highest = np.array([0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 0.5, 0.85])
    severity = np.stack([highest, np.zeros(12)], 1)
    for rate in (0.06, 0.31, 0.41, 0.81):
        thresholds = calibrate.thresholds_at(severity, examples, rate)
        flagged = severity[:, 0] >= thresholds[0]
        assert (flagged[:10].mean() + flagged[10:].mean()) / 2 <= rate
        assert thresholds[1] == calibrate.LOWEST_THRESHOLD  # it never speaks
    # One prompt of the larger set and one of the smaller: (1/10 + 1/2) / 2.
    assert calibrate.thresholds_at(severity, examples, 0.31)[0] == pytest.approx(0.801)


def test_a_category_that_confuses_is_held_back_alone() -> None:
    examples = [hard_benign("own", "hard_benign")] * 10
    confusing, sharp = np.linspace(0.5, 0.95, 10), np.linspace(0.0, 0.2, 10)
    thresholds = calibrate.thresholds_at(np.stack([confusing, sharp], 1), examples, 0.1)
    assert thresholds[0] > 0.89
    assert thresholds[1] == calibrate.LOWEST_THRESHOLD


def test_thresholds_ignore_prompts_that_are_not_hard_benign() -> None:
    hard = [hard_benign("own", "hard_benign")] * 4
    others = [hard_benign("clinc150", "prompt"), hard_benign("own", "harmful", harmful=True)]
    severity = np.array([[0.4], [0.5], [0.6], [0.7], [0.99], [0.98]])
    assert calibrate.thresholds_at(severity, hard + others, 0.25) == pytest.approx([0.601])


@pytest.mark.parametrize(
    ("highest", "rate"), [([0.2, 0.9999], 0.08), ([0.0001, 0.0002], 1.0)], ids=["sure", "any"]
)
def test_thresholds_are_ones_that_a_bundle_accepts(highest: list[float], rate: float) -> None:
    examples = [hard_benign("own", "hard_benign")] * 2
    (threshold,) = calibrate.thresholds_at(np.array(highest)[:, None], examples, rate).tolist()
    assert Calibration(slope=1.0, intercept=0.0, threshold=threshold).threshold == threshold


def test_thresholds_without_hard_benign_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="hard-benign"):
        calibrate.thresholds_at(np.array([[0.5]]), [hard_benign("clinc150", "prompt")], 0.08)


def test_calibrate_fits_and_writes_the_calibration(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(trained, tmp_path / "checkpoint")
    result = invoke(calibrate.main, "--checkpoint", checkpoint, "--data", data)
    assert result.exit_code == 0, result.output
    values = json.loads((checkpoint / "calibration.json").read_text())
    assert list(values) == CATEGORIES
    items = [Calibration(**values[name]) for name in CATEGORIES]  # refuses what a bundle would
    for name, item in zip(CATEGORIES, items, strict=True):
        assert f"{name}  {item.threshold:.3f}" in result.output

    examples = [e for e in development_examples(data, CATEGORIES) if half(e) == "calibration"]
    latent = latents(session_of(checkpoint), words_of(checkpoint), [e.prompt for e in examples])
    target, known = truth(examples, CATEGORIES)
    slope = np.array([item.slope for item in items])
    intercept = np.array([item.intercept for item in items])
    np.testing.assert_allclose((slope, intercept), calibrate.fit(latent, target, known), rtol=1e-6)
    severity = latent.severity(slope, intercept)
    thresholds = calibrate.thresholds_at(severity, examples, 0.11)
    assert [item.threshold for item in items] == thresholds.tolist()
    uncalibrated = cross_entropy(latent.severity(), target, known).sum()
    assert cross_entropy(severity, target, known).sum() < 0.95 * uncalibrated


def test_calibrate_says_what_data_it_lacks(trained: Path, tmp_path: Path) -> None:
    result = invoke(calibrate.main, "--checkpoint", trained, "--data", tmp_path)
    assert result.exit_code == 2
    assert "no rows in prompts/dev.jsonl" in " ".join(result.output.replace("│", " ").split())


def test_latents_give_the_severities_of_the_runtime(encoder: Path) -> None:
    screener = new_screener(encoder, 3, "variational", "eager").eval()
    words = Tokenizer((encoder / "tokenizer.json").read_bytes(), 16, 4)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(list(tiny.WORDS), k=n)) for n in (1, 3, 14, 15, 40, 90)]
    runtime = RuntimeScreener(torch_session(screener), [Calibration(1.0, 0.0, 0.5)] * 3)
    expected = [labels.severity for labels in runtime.score([words.encode(t) for t in texts])]
    severity = latents(torch_session(screener), words, texts).severity()
    np.testing.assert_allclose(severity, expected, atol=1e-12)


class Interrupted(Exception):
    pass


def interrupted_after(steps: int) -> Callable[[trainer.Trainer, Batch], dict[str, float]]:
    step = trainer.Trainer.train_step

    def train_step(self: trainer.Trainer, batch: Batch) -> dict[str, float]:
        if self.step == steps:
            raise Interrupted
        return step(self, batch)

    return train_step


def recording(steps: list[int]) -> Callable[[trainer.Trainer, Batch], dict[str, float]]:
    step = trainer.Trainer.train_step

    def train_step(self: trainer.Trainer, batch: Batch) -> dict[str, float]:
        steps.append(self.step)
        return step(self, batch)

    return train_step


def invoke(command: Callable[..., None], *arguments: object) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def plain_text(result: Any) -> str:
    """The output without the frames and line breaks that rich puts around errors."""
    return " ".join(result.output.replace("│", " ").split())


def states_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of five tokens; the second has two of padding."""
    return torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def read(kind: Any = "variational") -> Reading:
    torch.manual_seed(1)
    reading: Reading = Head(8, 3, kind)(*states_and_mask())
    return reading


def enhance(
    enhancer: Enhancer, reading: Reading, coarse: torch.Tensor, observed: torch.Tensor
) -> Posterior:
    posterior: Posterior = enhancer(reading, coarse, observed, torch.tensor([1.0, -1.0]))
    return posterior


def mixed_batch() -> Batch:
    """A graded row with a span, and a coarse row that is known to be harmful."""
    return Batch(
        ids=torch.ones(2, 5, dtype=torch.long),
        mask=states_and_mask()[1],
        coarse=torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        observed=torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]),
        severity=torch.tensor([[0.8, 0.3, 0.0], [0.0, 0.0, 0.0]]),
        graded=torch.tensor([1.0, 0.0]),
        harmful=torch.tensor([1.0, 1.0]),
        span=torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]),
    )


def variational(weights: Weights, anneal: float = 1.0) -> dict[str, torch.Tensor]:
    """The terms of one reading and one draw from the posterior, whatever the weights."""
    reading = read()
    torch.manual_seed(2)
    return variational_terms(reading, Enhancer(8, 3), mixed_batch(), weights, anneal)


def trained_layers(screener: Screener) -> list[torch.nn.Parameter]:
    """Weights of the encoder's layers. (A key's bias has no gradient: softmax cancels it.)"""
    named = screener.encoder.encoder.named_parameters()
    return [parameter for name, parameter in named if name.endswith("weight")]


def hard_benign(source: str, kind: str, harmful: bool = False) -> Example:
    return Example("prompt", source, kind, {}, None, harmful)


def miscalibrated() -> tuple[Latents, FloatArray, FloatArray]:
    """A latent of two categories, and the slopes and intercepts that would set it right."""
    rng = np.random.default_rng(0)
    latent = Latents(rng.normal(-1, 2, (1000, 2)), rng.uniform(0.2, 1.5, (1000, 2)))
    return latent, np.array([0.5, 2.0]), np.array([0.7, -1.0])


def cross_entropy(
    severity: FloatArray, target: FloatArray, known: FloatArray | None = None
) -> FloatArray:
    """Mean over the known rows of each category  [C]"""
    cells = -target * np.log(severity) - (1 - target) * np.log(1 - severity)
    mean: FloatArray = np.average(cells, 0, known)
    return mean


def session_of(checkpoint: Path) -> Any:
    return torch_session(load_screener(checkpoint)[0])


def words_of(checkpoint: Path) -> Tokenizer:
    return Tokenizer((checkpoint / "tokenizer.json").read_bytes(), 256, 64)


def prompt_row(
    rng: random.Random, source: str, hazard: str | None = None, **fields: Any
) -> dict[str, Any]:
    words = [*filler(rng), *([hazard] if hazard else [])]
    rng.shuffle(words)
    prompt, labels = " ".join(words), [HAZARDS[hazard]] if hazard else []
    row = {"id": prompt, "prompt": prompt, "source": source, "may_train": True}
    return row | {"harmful": bool(labels), "labels": labels} | fields


def graded_row(rng: random.Random) -> dict[str, Any]:
    hazard = rng.choice(list(HAZARDS))
    return prompt_row(rng, "graded", hazard, severity={HAZARDS[hazard]: 0.8})


def pair_row(rng: random.Random) -> dict[str, Any]:
    hazard, benign = rng.choice(list(HAZARDS)), " ".join(filler(rng))
    row = {"id": benign, "prompt": f"{benign} {hazard}", "refined": benign, "spans": [hazard]}
    row |= {"severity": {HAZARDS[hazard]: 0.9}, "source": "own", "kind": "harmful"}
    return row | {"action": "rewrite", "may_train": True}


def filler(rng: random.Random) -> list[str]:
    return rng.choices(["the", "cake", "hello", "safely"], k=rng.randint(1, 100))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(contents) if path.suffix == ".gz" else contents)
