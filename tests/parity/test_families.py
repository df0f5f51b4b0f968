"""Checkpoints of every family: what transformers computes of them, our graph computes too."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families
import tiny_refiner
from tiny_families import CONTEXT, FAMILIES, Reshaped, change_config

torch = pytest.importorskip("torch", reason="needs torch (the export extra)")
pytest.importorskip("transformers", reason="needs transformers (the export extra)")

from typer.testing import CliRunner

import lance_edge
from lance_edge.bundle import open_bundle
from lance_edge.decoder import Cache, Decoder
from lance_edge.errors import BundleCorrupt, BundleFileMissing, ExportError, InvalidOption
from lance_edge.llama import Source
from lance_edge.pull import pull
from lance_edge.weights import WEIGHTS, Array, Precision, make_weights
from lance_edge_engines import open_session
from lance_edge_export import causal
from lance_edge_export import cli as export
from lance_edge_export.decoder_graph import decoder_graph
from lance_edge_export.families import Checkpoint
from lance_edge_export.tensors import TensorFolder

pytestmark = pytest.mark.train

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
TOKENS = 60

STATE_ERROR = 2e-5  # of a state's length, fp32: another order of summation
INT8_ERROR = 0.15  # of a state's length: twelve products one after the other, random weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family; tests must not change them."""
    root = tmp_path_factory.mktemp("families")
    return {name: tiny_families.write_checkpoint(root / name, name) for name in FAMILIES}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def model(family: str) -> Any:
    return tiny_families.make_model(family)


def random_ids(count: int, seed: int = 3) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, 262, count).tolist()
    return ids


def state_decoder(source: Source, precision: Precision) -> Decoder:
    """Its second look's mean is the final state itself: the head is the identity."""
    hidden = source.shape.hidden
    head: dict[str, Array] = {
        "look.mean": np.eye(hidden, dtype=np.float32),
        "look.mean.bias": np.zeros(hidden, np.float32),
        "look.deviation": np.zeros((hidden, hidden), np.float32),
        "look.deviation.bias": np.zeros(hidden, np.float32),
    }
    graph = decoder_graph(source.shape, hidden, precision, CONTEXT).SerializeToString()
    weights = dict(make_weights(source, head, precision))
    return Decoder(open_session(graph, "cpu", threads=1, weights=weights), {}, 0, CONTEXT)


def errors(source: Source, family: str, precision: Precision) -> Array:
    """How far every second token's final state is from transformers', as a share of its length."""
    ids = random_ids(TOKENS)
    with torch.inference_mode():
        theirs = model(family).model(torch.tensor([ids])).last_hidden_state[0, 1::2].numpy()
    reader = state_decoder(source, precision)
    read = reader.start(TOKENS)
    ours = np.stack([reader.step(read, ids[at : at + 2], 1).mean for at in range(0, TOKENS, 2)])
    found: Array = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    return found


# What is computed


def test_fp32_states_are_those_of_transformers(folders: dict[str, Path], family: str) -> None:
    assert errors(Checkpoint(folders[family]), family, "fp32").max() < STATE_ERROR


def test_int8_states_are_close(folders: dict[str, Path], family: str) -> None:
    found = errors(Checkpoint(folders[family]), family, "int8")
    assert np.median(found) < INT8_ERROR
    assert found.max() < 2 * INT8_ERROR
    assert found.min() > 1e-4  # it is int8 that was run


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("llama", {"rope_scaling": None}),
        ("llama", {"biases": ("qkv", "o", "gate_up")}),
        ("llama", {"biases": ("qkv", "gate_up", "down")}),
        ("llama", {"biases": ("o", "gate_up", "down")}),
        ("llama", {"biases": ("qkv", "o", "down")}),
        ("smollm2", {"rope_base": 1e4}),
        ("mistral", {"windows": ()}),
        ("mistral", {"windows": (8, 7, 7)}),
        ("mistral", {"windows": (6, 7, 7)}),
        ("qwen2", {"biases": ()}),
        ("qwen2", {"windows": (0, 0, 5)}),
        ("qwen3", {"head_norms": False}),
        ("gemma3", {"embedding_scale": 1.0}),
        ("gemma3", {"attention_scale": 0.0}),
        ("gemma3", {"activation": "silu"}),
        ("gemma3", {"post_norms": False}),
        ("gemma3", {"head_norms": False}),
        ("gemma3", {"windows": ()}),
        ("gemma3", {"window_rope_base": 0.0}),
        ("gemma3", {"rope_scaling": None}),
    ],
    ids=str,
)
def test_every_part_of_a_shape_matters(
    folders: dict[str, Path], family: str, without: dict[str, Any]
) -> None:
    """Else the test above would not see whether it is there."""
    network = Checkpoint(folders[family])
    changed = Reshaped(network, replace(network.shape, **without))
    assert errors(changed, family, "fp32").max() > 100 * STATE_ERROR


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_untied_output_is_the_checkpoints(folders: dict[str, Path], family: str) -> None:
    """Which the states do not show; the tokens below do."""
    assert not Checkpoint(folders[family]).shape.tied
    assert "lm_head.weight" in TensorFolder(folders[family]).names


def greedy(family: str, ids: Sequence[int], count: int) -> list[int]:
    """What transformers writes after a prompt, one token at a time, without a cache."""
    written: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            logits = model(family)(torch.tensor([[*ids, *written]])).logits[0, -1]
            written.append(int(logits.argmax()))
    return written


def test_greedy_tokens_are_those_of_transformers(folders: dict[str, Path], family: str) -> None:
    """Prefill, drafts of several tokens that are kept in part, and rollback between them."""
    prompt = random_ids(20, seed=4)
    expected = greedy(family, prompt, 24)
    reader = state_decoder(Checkpoint(folders[family]), "fp32")
    read = reader.start(100)
    written = reader.step(read, prompt, first=19).tokens
    for right, wrong in ((0, 3), (4, 2), (1, 6), (6, 1), (2, 0), (0, 0), (5, 9)):
        draft = expected[len(written) : len(written) + right] + random_ids(wrong, seed=wrong)
        following = reader.step(read, [written[-1], *draft]).tokens
        read.rollback(read.length - wrong)
        written += following[: right + 1]
    assert len(written) > 24
    assert written[:24] == expected
    assert len(set(expected)) > 5


# Steps


def kept(read: Cache, layers: int) -> list[bytes]:
    names = [f"{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")]
    return [read.state.read(name)[:, :, : read.length].tobytes() for name in names]


def read_all(reader: Decoder, ids: Sequence[int], sizes: Sequence[int]) -> tuple[Cache, list[int]]:
    read, tokens = reader.start(len(ids)), []
    for size in list(sizes) * len(ids):
        if new := ids[read.length :][:size]:
            tokens += reader.step(read, new).tokens
    return read, tokens


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_token_does_not_depend_on_the_step_it_is_in(
    folders: dict[str, Path], family: str, precision: Precision
) -> None:
    """Bit by bit: else a draft could change what is written."""
    reader, ids = state_decoder(Checkpoint(folders[family]), precision), random_ids(70, seed=5)
    whole, tokens = read_all(reader, ids, [70])
    for sizes in ([1], [2], [5], [17, 3], [65]):
        read, found = read_all(reader, ids, sizes)
        assert found == tokens, sizes
        assert kept(read, 3) == kept(whole, 3), sizes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_rolled_back_leaves_no_trace(
    folders: dict[str, Path], family: str, precision: Precision
) -> None:
    """More was read than a window holds."""
    reader = state_decoder(Checkpoint(folders[family]), precision)
    before, rejected, after = random_ids(13, 7), random_ids(20, 8), random_ids(9, 9)
    read = reader.start(50)
    reader.step(read, before)
    reader.step(read, rejected)
    read.rollback(13)
    tokens = reader.step(read, after).tokens
    fresh, expected = read_all(reader, [*before, *after], [13])
    assert tokens == expected[13:]
    assert kept(read, 3) == kept(fresh, 3)


# What is read


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_every_precision_is_read_as_torch_reads_it(tmp_path: Path, kind: str) -> None:
    network = tiny_families.make_model("smollm2").to(getattr(torch, kind))
    network.save_pretrained(tmp_path, max_shard_size="100KB")
    tensors = TensorFolder(tmp_path)
    assert len(tensors.files) > 1
    for name, stored in network.state_dict().items():
        if name != "lm_head.weight":  # the embedding, once more
            np.testing.assert_array_equal(tensors.tensor(name), stored.float().numpy())


# The command


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny screener with gradients, and a refiner of another kind that is replaced."""
    return tiny_refiner.write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_families.write_template(tmp_path_factory.mktemp("template"))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(export.app, ["refiner", *map(str, arguments)])


def options(checkpoint: Path, bundle: Path, template: Path, out: Path) -> list[object]:
    given = {"checkpoint": checkpoint, "bundle": bundle, "template": template, "out": out}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def plain_text(result: Any) -> str:
    return " ".join(result.output.split())


def refusal(*arguments: object) -> str:
    """What a failed export says."""
    result = run(*arguments)
    assert result.exit_code == 3, result.output
    return plain_text(result)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight records of refinement, some longer than the windows."""
    rng = random.Random(0)

    def text(words: int) -> str:
        return " ".join(rng.choices(list(tiny.WORDS), k=words))

    rows = [
        {"prompt": text(words), "gradient": {"a": text(5)}, "refined": text(words)}
        for words in range(3, 11)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def exported(
    folders: dict[str, Path],
    bundle: Path,
    template: Path,
    pairs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Bundles that the command wrote: every family in fp32, two of them in int8."""
    root = tmp_path_factory.mktemp("exported")
    wanted = [(name, "fp32") for name in FAMILIES] + [("llama", "int8"), ("gemma3", "int8")]
    with pytest.MonkeyPatch.context() as patch:
        # A network of random weights is unsure of every token: int8 decides other ones.
        patch.setitem(causal.LEAST_AGREEMENT, "int8", 0.6)
        for family, precision in wanted:
            out = root / f"{family}-{precision}"
            given = options(folders[family], bundle, template, out)
            result = run(*given, "--precision", precision, "--pairs", pairs)
            assert result.exit_code == 0, result.output
    return {path.name: path for path in root.iterdir()}


def test_a_bundle_says_what_its_refiner_is(exported: dict[str, Path]) -> None:
    assert len(exported) == len(FAMILIES) + 2  # and nothing was left lying beside them
    for name, folder in exported.items():
        family, precision = name.split("-")
        opened = open_bundle(folder)
        spec, parity = opened.manifest.refiner, opened.manifest.parity
        assert spec is not None
        assert (spec.precision, spec.base, spec.delta) == (precision, None, None)
        assert parity["refiner fp32"]["agreement"] >= 0.995
        assert parity["refiner fp32"]["tokens"] > 150
        assert ("refiner int8" in parity) == (precision == "int8")
        made_from = opened.manifest.provenance["refiner"]
        assert made_from["architecture"] == FAMILIES[family][0]
        assert set(made_from["files"]) == {"config.json", "tokenizer.json", "model.safetensors"}
        assert WEIGHTS in opened.verify()
        assert {path.name for path in folder.iterdir()} == {*opened.manifest.files, "manifest.json"}
        assert "refiner_delta.npz" not in opened.manifest.files  # the replaced refiner's
        assert made_from["architecture"] in (folder / "README.md").read_text()


def test_a_bundle_refines_without_a_pull(
    exported: dict[str, Path], folders: dict[str, Path], monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "empty"))
    for name, folder in exported.items():
        assert pull(open_bundle(folder)) == folder / WEIGHTS
        with lance_edge.load(folder, "cpu", threads=1) as guard:
            verdict = guard.refine("hello the bomb")
            reading = guard.refiner.read("hello the bomb")
            critique = verdict.critique
            assert critique is not None
            drafted = guard.refiner.rewrite(reading, critique)
            plain = guard.refiner.rewrite(reading, critique, speculative=False)
            opening = [
                *guard.refiner.tokenizer.before_critique(list(reading.prompt)),
                *guard.refiner.tokenizer.after_prompt(critique),
            ]
        assert verdict.look == 1  # the refiner has no second look
        assert verdict.steps
        assert drafted.ids == plain.ids
        if name.endswith("fp32"):
            written = greedy(name.split("-")[0], opening, 12)
            assert list(drafted.ids[:12]) == written[: len(drafted.ids)]
    assert not (tmp_path / "empty").exists()


def test_a_second_look_that_is_not_there_is_refused(exported: dict[str, Path]) -> None:
    with pytest.raises(InvalidOption, match="has no second look; choose looks auto or 1"):
        lance_edge.load(exported["llama-int8"], "cpu", looks="2")


def test_lost_or_changed_weights_name_the_bundle(exported: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported["llama-int8"], tmp_path / "copy")
    weights = folder / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for act in (lambda: lance_edge.load(folder, "cpu").refiner, lambda: pull(open_bundle(folder))):
        with pytest.raises(BundleCorrupt, match="copy or export the bundle again"):
            act()
    weights.unlink()
    for act in (lambda: lance_edge.load(folder, "cpu").refiner, lambda: pull(open_bundle(folder))):
        with pytest.raises(BundleFileMissing, match=r"refiner\.weights is missing"):
            act()
    weights.symlink_to(exported["llama-int8"] / WEIGHTS)
    with pytest.raises(BundleCorrupt, match="symbolic link"):
        _ = lance_edge.load(folder, "cpu").refiner


def test_a_refiner_can_be_exported_over_one_with_weights(
    exported: dict[str, Path], folders: dict[str, Path], template: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(exported["llama-int8"], tmp_path / "own")
    result = run(*options(folders["qwen3"], out, template, out), "--precision", "fp32")
    assert result.exit_code == 0, result.output
    opened = open_bundle(out)
    assert opened.manifest.parity.keys() == {"refiner fp32"}
    assert opened.manifest.refiner == open_bundle(exported["qwen3-fp32"]).manifest.refiner


def test_pairs_are_what_is_compared(
    folders: dict[str, Path], bundle: Path, template: Path, tmp_path: Path
) -> None:
    row = {"prompt": "hello the bomb", "gradient": {"a": "less", "b": "more"}, "refined": "hello"}
    blocked = {**row, "refined": None}
    pairs = tmp_path / "pairs.jsonl"
    given = [*options(folders["llama"], bundle, template, tmp_path / "out"), "--pairs", pairs]
    pairs.write_text("\n".join(map(json.dumps, [blocked, row, row])))
    assert run(*given, "--precision", "fp32").exit_code == 0
    parity = open_bundle(tmp_path / "out").manifest.parity["refiner fp32"]
    assert parity["tokens"] == 2 * (1 + len(tiny_refiner.language().encode("hello")))
    pairs.write_text(json.dumps(blocked))
    assert "no records with a rewrite" in refusal(*given)


@pytest.mark.parametrize("stage", ["fp32", "int8"])
def test_a_stage_out_of_bounds_writes_nothing(
    folders: dict[str, Path],
    bundle: Path,
    template: Path,
    tmp_path: Path,
    monkeypatch: Any,
    stage: str,
) -> None:
    monkeypatch.setattr(causal, "LEAST_AGREEMENT", {"fp32": 0.0, "int8": 0.0, stage: 1.01})
    out = tmp_path / "room" / "out"
    message = refusal(*options(folders["llama"], bundle, template, out))
    assert f"{stage}: " in message
    assert "nothing was written" in message
    assert not list(out.parent.iterdir())


def test_the_gate_sees_another_network(
    folders: dict[str, Path], bundle: Path, template: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A part of the shape that we would read wrongly does not get past transformers."""
    from lance_edge_export import families

    read = families.read_shape
    monkeypatch.setattr(families, "read_shape", lambda *given: replace(read(*given), windows=()))
    message = refusal(*options(folders["mistral"], bundle, template, tmp_path / "out"))
    assert "fp32: " in message


# What is refused


def changed_copy(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    change_config(to, changes)
    return to


def test_a_missing_template_is_asked_for(
    folders: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    given = options(folders["llama"], bundle, tmp_path / "none", tmp_path / "out")
    del given[4:6]
    assert "give --template FILE" in refusal(*given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("contents", "cause"),
    [
        ("[]", "holds a list"),
        ("{", "not valid JSON"),
        ('{"prefix": "", "read": "", "write": ""}', "must hold the texts prefix, read, write, end"),
        ('{"prefix": "", "read": "x", "write": "x", "end": "x"}', "must be one control token"),
        (
            '{"prefix": "", "read": "x", "write": "<|im_end|>", "end": "<|im_end|>"}',
            "read must begin with a control token",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_refused(
    folders: dict[str, Path], bundle: Path, tmp_path: Path, contents: str, cause: str
) -> None:
    (tmp_path / "template.json").write_text(contents)
    given = options(folders["llama"], bundle, tmp_path / "template.json", tmp_path / "out")
    assert cause in refusal(*given)


def test_a_template_without_a_prefix_will_do(
    folders: dict[str, Path], bundle: Path, tmp_path: Path
) -> None:
    values = {"prefix": "", "read": "<|im_end|>", "write": "<|im_start|>", "end": "<|im_end|>"}
    (tmp_path / "template.json").write_text(json.dumps(values))
    given = options(folders["smollm2"], bundle, tmp_path / "template.json", tmp_path / "out")
    result = run(*given, "--precision", "fp32")
    assert result.exit_code == 0, result.output
    with lance_edge.load(tmp_path / "out", "cpu", threads=1) as guard:
        assert guard.refine("hello the bomb").steps


def test_a_checkpoint_without_a_tokenizer_is_refused(
    folders: dict[str, Path], bundle: Path, template: Path, tmp_path: Path
) -> None:
    folder = changed_copy(folders["llama"], tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(
        *options(folder, bundle, template, tmp_path / "o")
    )
    (folder / "tokenizer.json").write_text("{}")
    assert "cannot be read" in refusal(*options(folder, bundle, template, tmp_path / "o"))


def test_a_tokenizer_of_another_network_is_refused(
    folders: dict[str, Path], bundle: Path, template: Path, tmp_path: Path
) -> None:
    folder = changed_copy(folders["llama"], tmp_path / "copy")
    larger = tiny_refiner.tokenizer()
    larger.add_tokens([f"word{n}" for n in range(11)])
    larger.save(str(folder / "tokenizer.json"))
    message = refusal(*options(folder, bundle, template, tmp_path / "out"))
    assert "has tokens up to 272, and config.json a vocabulary of 272" in message


def test_a_tokenizer_that_loses_text_is_refused(
    folders: dict[str, Path], bundle: Path, template: Path, tmp_path: Path
) -> None:
    from tokenizers import normalizers

    folder = changed_copy(folders["llama"], tmp_path / "copy")
    loses = tiny_refiner.tokenizer()
    loses.normalizer = normalizers.Replace("o", "")
    loses.save(str(folder / "tokenizer.json"))
    message = refusal(*options(folder, bundle, template, tmp_path / "out"))
    assert "needs one that keeps every character" in message


def test_a_context_without_room_is_refused(
    folders: dict[str, Path], bundle: Path, template: Path, tmp_path: Path
) -> None:
    folder = changed_copy(folders["smollm2"], tmp_path / "copy", max_position_embeddings=420)
    message = refusal(*options(folder, bundle, template, tmp_path / "out"))
    assert "a context of 420 tokens has no room" in message


def test_a_trainers_checkpoint_needs_its_base(
    folders: dict[str, Path], bundle: Path, template: Path, tmp_path: Path
) -> None:
    folder = changed_copy(folders["llama"], tmp_path / "copy")
    given = options(folder, bundle, template, tmp_path / "out")
    assert "has no refiner.json, so it was not trained from --base" in refusal(
        *given, "--base", tmp_path / "x.gguf"
    )
    (folder / "refiner.json").write_text("{}")
    assert "it needs --base" in refusal(*given)


def test_a_bundle_without_gradients_asks_for_them(
    folders: dict[str, Path], template: Path, tmp_path: Path
) -> None:
    bare = tiny.write_bundle(tmp_path / "bare")
    given = options(folders["llama"], bare, template, tmp_path / "out")
    assert "give --gradients FILE" in refusal(*given)
    gradients = tmp_path / "gradients.json"
    gradients.write_bytes(tiny_refiner.files()["gradients.json"])
    result = run(*given, "--gradients", gradients, "--precision", "fp32")
    assert result.exit_code == 0, result.output


def test_a_wrong_shape_is_an_export_error(folders: dict[str, Path], tmp_path: Path) -> None:
    """Of a network that transformers made; tests/unit/test_checkpoints.py has all the others."""
    folder = changed_copy(folders["gemma3"], tmp_path / "copy", head_dim=16)
    with pytest.raises(ExportError, match=r"has the shape \[.*\], and config.json describes"):
        Checkpoint(folder)
