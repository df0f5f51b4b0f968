"""Every encoder family, with our head and as a plain classifier, against torch."""

# ruff: noqa: E402 - what follows importorskip must not be imported without torch

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

torch = pytest.importorskip("torch", reason="needs torch (the export extra)")
transformers = pytest.importorskip("transformers", reason="needs transformers (the export extra)")
pytest.importorskip("onnxscript", reason="needs onnxscript (the export extra)")

import onnx
import tokenizers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lance_edge
from lance_edge.errors import ExportError
from lance_edge_engines import open_session
from lance_edge_export import checkpoint, cli, parity, screener
from lance_edge_export.checkpoint import (
    ENCODERS,
    Checkpoint,
    ClassifierGraph,
    categories_among,
    read_checkpoint,
    slug,
)
from lance_edge_export.fused import ATTENTION, NORM, fuse, unfuse
from lance_edge_export.fusion import fusion
from lance_edge_export.graph import PRODUCT
from lance_edge_export.half import half_products
from lance_edge_export.layers import layer_errors, linear_layers
from lance_edge_export.optimise import merge_projections
from lance_edge_export.quantise import int8_products
from lance_edge_export.taxonomy import read_text, with_taxonomy
from lance_edge_export.to_onnx import export_screener
from lance_edge_training.checkpoint import new_screener, save_screener
from lance_edge_training.evaluate import network_session

pytestmark = [
    pytest.mark.train,
    # transformers' own, when it imports DeBERTa and ModernBERT
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

FUSED = ("bert", "roberta", "xlm-roberta", "electra")  # whose attention becomes one operator
WORDS = tiny.tokenizer()
VOCABULARY = WORDS.get_vocab_size()
LABELS = ("safe", "Violence/Threats", "privacy")
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**COMMON),
    "roberta": lambda: transformers.RobertaConfig(**{**COMMON, "pad_token_id": 1}),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**{**COMMON, "pad_token_id": 1}),
    "electra": lambda: transformers.ElectraConfig(**COMMON, embedding_size=16),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=64,
        max_position_embeddings=66,
        pad_token_id=0,
    ),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **COMMON,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **COMMON,
        local_attention=8,
        global_attn_every_n_layers=2,
        cls_token_id=2,
        sep_token_id=3,
        bos_token_id=2,
        eos_token_id=3,
    ),
}


def config_of(family: str, **more: Any) -> Any:
    config = CONFIGS[family]()
    config.update({"id2label": dict(enumerate(LABELS)), **more})
    config.label2id = {label: index for index, label in config.id2label.items()}
    return config


def random_model(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    made = kind.from_config(config)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # zero in a fresh model, where mixed-up biases would not show
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def write_classifier(folder: Path, family: str = "bert", **more: Any) -> Path:
    config = config_of(family, **more)
    made = random_model(transformers.AutoModelForSequenceClassification, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "classifier" in name or "out_proj" in name:
                parameter *= 4  # so that severities differ from prompt to prompt
    made.save_pretrained(folder)
    WORDS.save(str(folder / "tokenizer.json"))
    return folder


def write_screener(folder: Path, family: str) -> Path:
    encoder = folder / "encoder"
    random_model(transformers.AutoModel, config_of(family)).save_pretrained(encoder)
    WORDS.save(str(encoder / "tokenizer.json"))
    made = new_screener(encoder, len(tiny.CATEGORIES), "variational")
    taxonomy = [{"name": n, "title": n.title(), "action": "rewrite"} for n in tiny.CATEGORIES]
    description = {"window": 16, "overlap": 4, "provenance": {"sources": ["own"]}}
    save_screener(made, folder, encoder / "tokenizer.json", taxonomy, description)
    neutral = {"slope": 1.0, "intercept": 0.0, "threshold": 0.5}
    (folder / "calibration.json").write_text(json.dumps(dict.fromkeys(tiny.CATEGORIES, neutral)))
    return folder


def inputs(rows: int, tokens: int) -> dict[str, Any]:
    """Rows of different lengths; the first fills its width."""
    rng = np.random.default_rng(rows * tokens)
    ids = rng.integers(4, VOCABULARY, (rows, tokens))
    lengths = np.append(tokens, rng.integers(1, tokens + 1, rows - 1))
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    return {"ids": ids * mask, "mask": mask}


def difference(checkpoint: Checkpoint, graph: onnx.ModelProto, output: str | None = None) -> float:
    """The largest between torch and a graph, over several shapes."""
    wanted = network_session(checkpoint.network, len(checkpoint.taxonomy))
    found = open_session(graph.SerializeToString(), "cpu", 1)
    largest = 0.0
    for shape in ((1, 8), (3, 16), (5, 40), (2, 64)):
        feed = inputs(*shape)
        a, b = wanted.run(feed), found.run(feed)
        names = [output] if output else list(a)
        largest = max(largest, *(float(np.abs(a[name] - b[name]).max()) for name in names))
    return largest


def test_every_supported_encoder_is_tested() -> None:
    assert set(CONFIGS) == set(ENCODERS)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_screener_of_each_family_exports(family: str, tmp_path: Path) -> None:
    read = read_checkpoint(write_screener(tmp_path, family))
    plain = merge_projections(export_screener(read.network))
    graph = fuse(plain)
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds[ATTENTION] == (2 if family in FUSED else 0)  # of two layers
    assert kinds[NORM] > 0
    assert difference(read, graph) < 1e-5
    assert difference(read, unfuse(graph)) < 1e-5
    int8 = int8_products(graph, [inputs(1, 8), inputs(3, 16)])
    assert sum(node.op_type == PRODUCT for node in int8.graph.node) >= 4
    assert 0 < difference(read, int8, "mean") < 0.1


@pytest.mark.parametrize("family", CONFIGS)
def test_a_classifier_of_each_family_exports(family: str, tmp_path: Path) -> None:
    read = read_checkpoint(write_classifier(tmp_path, family))
    assert [entry["name"] for entry in read.taxonomy] == ["violence_threats", "privacy"]
    assert read.window == 64
    graph = export_screener(read.network, read.window)
    assert difference(read, graph) < 1e-5
    # Its severities are the softmax of the model itself.
    feed = inputs(3, 16)
    latent = open_session(graph.SerializeToString(), "cpu", 1).run(feed)["mean"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.inference_mode():
        logits = model(
            input_ids=torch.from_numpy(feed["ids"]), attention_mask=torch.from_numpy(feed["mask"])
        ).logits
    shares = logits.softmax(-1).numpy()[:, 1:]
    np.testing.assert_allclose(1 / (1 + np.exp(-latent)), shares, atol=1e-5)


def test_labels_that_may_hold_together_keep_their_logits(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, problem_type="multi_label_classification")
    read = read_checkpoint(folder)
    assert isinstance(read.network, ClassifierGraph)
    assert not read.network.single
    feed = inputs(3, 16)
    ids, mask = (torch.from_numpy(feed[name]) for name in ("ids", "mask"))
    with torch.inference_mode():
        logits = read.network.classifier(input_ids=ids, attention_mask=mask).logits
        mean, deviation, contributions = read.network(ids, mask)
    np.testing.assert_array_equal(mean, logits[:, 1:])
    assert not deviation.any()
    assert contributions.shape == (3, 16, 2)
    assert not contributions.any()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_classifier_becomes_a_bundle_that_screens(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.BOUNDS, "int8", parity.Bounds(0.5, 0.1, 0.2))  # it is not trained
    folder, out = write_classifier(tmp_path / "guard"), tmp_path / "bundle"
    taxonomy = [
        {"name": "privacy", "title": "Privacy", "action": "review"},
        {"name": "violence_threats", "title": "Threats", "action": "block"},
    ]
    (tmp_path / "taxonomy.json").write_text(json.dumps(taxonomy))
    prompts = tmp_path / "prompts.jsonl"
    texts = ["hello the cake", "kill the minor with a bomb", "spy safely", "bomb", "cake [ ]"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    result = CliRunner().invoke(
        cli.app,
        [
            "screener",
            "--checkpoint",
            str(folder),
            "--out",
            str(out),
            "--precision",
            precision,
            "--prompts",
            str(prompts),
            "--taxonomy",
            str(tmp_path / "taxonomy.json"),
        ],
    )
    assert result.exit_code == 0, result.output
    with lance_edge.load(out, device="cpu") as guard:
        verdicts = guard.screen_many(texts)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        for text, verdict in zip(texts, verdicts, strict=True):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([WORDS.encode(text).ids])).logits
            wanted = logits.softmax(-1)[0]
            found = [verdict.severity[name] for name in ("violence_threats", "privacy")]
            bound = {"fp32": 1e-5, "fp16": 0.01, "int8": 0.1}[precision]
            np.testing.assert_allclose(found, wanted[1:].numpy(), atol=bound)
            assert verdict.spans == ()  # a classifier says nothing of words
        assert [c.title for c in guard.bundle.categories] == ["Threats", "Privacy"]
        manifest = guard.bundle.manifest
        assert manifest.name == "bundle"
        assert set(manifest.parity) == {"fp32", precision}
        if precision != "fp32":
            assert len(manifest.parity[precision]["worst_layers"]) == 4


def test_fp16_halves_the_weights_and_keeps_the_head(tmp_path: Path) -> None:
    read = read_checkpoint(write_classifier(tmp_path))
    graph = export_screener(read.network, read.window)
    half = half_products(graph)
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert sum(kind == onnx.TensorProto.FLOAT16 for kind in kinds.values()) >= 5
    assert difference(read, half) < 5e-3
    (classifier,) = (name for name in kinds if name.endswith("classifier.weight"))
    assert kinds[classifier] == onnx.TensorProto.FLOAT
    assert [value.type.tensor_type.elem_type for value in half.graph.output] == [1, 1, 1]


def test_the_report_counts_what_the_runtime_fuses() -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", 8])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", 8])
    values = {"w": np.ones((8, 8), np.float32), "b": np.ones(8, np.float32)}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w"], ["product"]),
            onnx.helper.make_node("Add", ["product", "b"], ["sum"]),
            onnx.helper.make_node("Gelu", ["sum"], ["gelu"]),
            onnx.helper.make_node("Identity", ["gelu"], ["y"]),
        ],
        "g",
        [x],
        [y],
        [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    found = fusion(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert found.before == 4
    assert found.after < 4
    assert sum(found.fused.values()) + sum(found.left.values()) == found.after
    assert "Identity" not in found.left


def test_a_layer_may_be_kept_in_fp32(tmp_path: Path) -> None:
    read = read_checkpoint(write_screener(tmp_path, "bert"))
    graph = merge_projections(export_screener(read.network))
    feeds = [inputs(1, 8), inputs(3, 16)]
    int8 = int8_products(graph, feeds)
    errors = layer_errors(graph, int8, feeds)
    assert list(errors) == sorted(errors, key=lambda name: -errors[name])
    assert set(errors) == set(linear_layers(graph))
    assert 0 < min(errors.values()) <= max(errors.values()) < 0.1
    first = next(iter(linear_layers(graph)))
    kept = int8_products(graph, feeds, [first])
    integer = [node for node in int8.graph.node if node.op_type == PRODUCT]
    left = [node for node in kept.graph.node if node.op_type == PRODUCT]
    assert len(left) == len(integer) - 1
    assert layer_errors(graph, kept, feeds)[first] < errors[first]
    with pytest.raises(ExportError, match="there is no layer 'nothing' to keep; there are"):
        int8_products(graph, feeds, ["nothing"])


def test_a_failed_gate_names_the_worst_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.BOUNDS, "int8", parity.Bounds(1e-9, 1e-9, 0.0))
    folder = write_classifier(tmp_path / "guard")
    read = read_checkpoint(folder)
    wishes = screener.Wishes("int8", "tiny", "1.0")
    with pytest.raises(lance_edge.errors.ParityError, match=r"moved most: \S+ \(0\.\d+\)"):
        screener.export_bundle(read, tmp_path / "out", wishes, ["the bomb"], ["the bomb"], print)
    assert not (tmp_path / "out").exists()


# what is refused


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    edit_config(write_classifier(tmp_path), model_type="t5")
    with pytest.raises(ExportError, match=r"is a 't5' and the encoders .* are bert, deberta-v2"):
        read_checkpoint(tmp_path)


def test_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    edit_config(write_classifier(tmp_path), architectures=["BertModel"])
    with pytest.raises(ExportError, match="neither a screener of `lance_edge_training`"):
        read_checkpoint(tmp_path)


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    config = config_of("bert")
    random_model(transformers.AutoModel, config).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["BertForSequenceClassification"])
    WORDS.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ExportError, match=r"no weights for classifier\.bias, classifier\.weight"):
        read_checkpoint(tmp_path)


def test_which_label_is_benign_must_be_known() -> None:
    assert categories_among(["Safe", "violence"], (), True) == [1]
    assert categories_among(["violence", "privacy"], (), False) == [0, 1]
    assert categories_among(["LABEL_0", "LABEL_1"], ["LABEL_0"], True) == [1]
    with pytest.raises(ExportError, match="name it with --benign"):
        categories_among(["LABEL_0", "LABEL_1"], (), True)
    with pytest.raises(ExportError, match="there is no label 'fine' to be benign"):
        categories_among(["safe", "violence"], ["fine"], True)
    with pytest.raises(ExportError, match="all labels are benign"):
        categories_among(["safe"], (), False)


def test_labels_become_names() -> None:
    assert slug("Sexual/Minors") == "sexual_minors"
    assert slug("S10: Hate ") == "s10_hate"
    assert slug("???") == "label"


@pytest.mark.parametrize("labels", [("safe", "a b", "a_b"), ("safe", "None!", "b")])
def test_labels_need_names_of_their_own(labels: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, id2label=dict(enumerate(labels)))
    with pytest.raises(ExportError, match="make no distinct names"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["head.safetensors", "taxonomy.json", "calibration.json"])
def test_a_screener_that_lacks_a_file_says_which(name: str, tmp_path: Path) -> None:
    write_screener(tmp_path, "bert")
    (tmp_path / name).unlink()
    with pytest.raises(ExportError, match=f"has no {name}"):
        read_checkpoint(tmp_path)


def change(path: Path, **values: Any) -> None:
    """Other values in a JSON object; None removes one."""
    found = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "classifier"])
def test_weights_must_be_those_of_the_config(family: str, ours: bool, tmp_path: Path) -> None:
    folder = (write_screener if ours else write_classifier)(tmp_path, family)
    weights = load_file(folder / "model.safetensors")
    cut = {name: w for name, w in weights.items() if not re.search(r"layers?\.1\.", name)}
    assert len(cut) < len(weights)
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"has no weights for .*layers?\.1\..* would be random"):
        read_checkpoint(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    layers = "n_layers" if family == "distilbert" else "num_hidden_layers"
    change(folder / "config.json", **{layers: 1}, layer_types=None)
    with pytest.raises(ExportError, match=r"layers?\.1\..*, of which config\.json says nothing"):
        read_checkpoint(folder)


def test_heads_of_other_tasks_may_be_left_out(tmp_path: Path) -> None:
    folder = write_screener(tmp_path, "bert")
    weights = load_file(folder / "model.safetensors")
    surplus = {f"{name}.weight": torch.zeros(2) for name in ("pooler.dense", "cls.predictions")}
    save_file({**weights, **surplus}, folder / "model.safetensors", {"format": "pt"})
    assert len(read_checkpoint(folder).taxonomy) == len(tiny.CATEGORIES)


def test_other_weights_may_not_be_left_out(tmp_path: Path) -> None:
    for folder in (write_screener(tmp_path / "own", "bert"), write_classifier(tmp_path / "guard")):
        weights = load_file(folder / "model.safetensors")
        weights["embeddings.projection.weight"] = torch.zeros(2)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ExportError, match=r"has weights for embeddings\.projection\.weight"):
            read_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "head.safetensors", "screener.json", "tokenizer.json"]
)
def test_a_screener_whose_file_was_cut_short_is_refused(name: str, tmp_path: Path) -> None:
    path = write_screener(tmp_path, "bert") / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ExportError, match="cannot be read"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"id2label": {"1": "safe", "2": "bad", "3": "worse"}}, "number the labels from 0 to 2"),
        ({"hidden_size": 64}, "cannot be read"),
        ({"vocab_size": 8}, "cannot be read"),
    ],
)
def test_an_odd_config_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    change(folder / "config.json", **values)
    with pytest.raises(ExportError, match=message):
        read_checkpoint(folder)


def test_a_tokenizer_of_another_network_is_refused(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.add_tokens([f"word{index}" for index in range(VOCABULARY)])
    other.save(str(folder / "tokenizer.json"))
    with pytest.raises(ExportError, match=f"a vocabulary of {VOCABULARY}; they do not belong"):
        read_checkpoint(folder)


def test_an_adapter_must_be_merged_first(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(ExportError, match="merge the adapter into its base"):
        read_checkpoint(folder)


def test_weights_must_be_finite_and_few_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_classifier(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "MOST_BYTES", 1000)
        with pytest.raises(ExportError, match="an ONNX file holds less than 2"):
            read_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"classifier\.bias in .* not finite"):
        read_checkpoint(folder)


def test_a_regression_has_no_categories(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path, problem_type="regression")
    with pytest.raises(ExportError, match="is a regression"):
        read_checkpoint(folder)


def test_a_window_must_fit_the_encoder(tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    assert read_checkpoint(folder, window=32).window == 32
    with pytest.raises(ExportError, match="window of 72 tokens does not fit an encoder for 64"):
        read_checkpoint(folder, window=72)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"prompts\.jsonl, line 1: "),
        ('{"text": "hello"}', r"prompts\.jsonl, record 1, lacks prompt"),
        ('["hello"]', r"prompts\.jsonl, record 1, is no object"),
        ('{"prompt": 5}', r"prompts\.jsonl, record 1, has 5 for prompt"),
        ('{"prompt": null}', r"prompts\.jsonl, record 1, has None for prompt"),
    ],
)
def test_a_bad_record_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ExportError, match=message):
        list(cli.records(path, prompt=str))


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "hello"}\n' * 1000)
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(whole[:-9])
    with pytest.raises(ExportError, match=r"prompts\.jsonl\.gz cannot be read"):
        list(cli.records(path, prompt=str))


def test_golden_prompts_are_looked_at_first(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'hello.*' cannot be used: the prompt has a NUL"):
        cli.check_prompts(["hello", "hello\0"])
    path = tmp_path / "golden.txt"
    path.write_bytes(b"hello \xff")
    with pytest.raises(ExportError, match=r"golden\.txt is not valid UTF-8 \(byte 7\)"):
        read_text(path)


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("years of work")
    folder = write_classifier(tmp_path / "guard")
    arguments = ["screener", "--checkpoint", str(folder), "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "something else than a bundle" in result.output
    assert (out / "chapter1.txt").read_text() == "years of work"


def test_a_taxonomy_must_fit() -> None:
    found = [{"name": name, "title": name, "action": "block"} for name in "ab"]
    given = [{"name": name, "title": name.upper(), "action": "review"} for name in "ba"]
    assert [entry["title"] for entry in with_taxonomy(found, given)] == ["A", "B"]
    deny = [given[0], {**given[1], "action": "deny"}]
    for wrong in (given[:1], [*given, given[0]], ["a", "b"], [{"title": "A"}], 5, deny):
        with pytest.raises(ExportError, match="taxonomy"):
            with_taxonomy(found, wrong)
