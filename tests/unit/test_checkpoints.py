"""Checkpoint folders of other people: what a config means, and what is refused. Needs no torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_refiner
from onnx import numpy_helper

import lance_edge
from lance_edge.bundle import open_bundle
from lance_edge.errors import BundleError, BundleFileMissing, ExportError, InvalidOption
from lance_edge.gguf import Float32Array
from lance_edge.llama import LINEARS, LlamaShape, RopeScaling
from lance_edge.pull import pull
from lance_edge.weights import WEIGHTS, layout, quantise
from lance_edge_export.decoder_graph import decoder_graph, rotary_rates
from lance_edge_export.families import (
    FAMILIES,
    Checkpoint,
    Config,
    Family,
    architecture,
    expected_tensors,
    read_shape,
)
from lance_edge_export.tensors import INDEX, WHOLE, TensorFolder

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
GEMMA = {**LLAMA, "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 12}


def write_config(folder: Path, values: Mapping[str, Any]) -> Config:
    path = folder / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return Config(path)


def shape_of(folder: Path, base: Mapping[str, Any] = LLAMA, **changes: Any) -> LlamaShape:
    """What a config with these values describes."""
    config = write_config(folder, {**base, **changes})
    return read_shape(config, FAMILIES[architecture(config)])


def safetensors(arrays: Mapping[str, Any], kind: str = "F32") -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        stored = array.tobytes()
        offsets = [len(data), len(data) + len(stored)]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += stored
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def arrays_of(shape: LlamaShape, family: Family) -> dict[str, Float32Array]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(sizes).astype(np.float32)
        for name, sizes in expected_tensors(family, shape).items()
    }


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Float32Array]:
    """The tensors of `folder`."""
    return arrays_of(shape_of(tmp_path), FAMILIES["LlamaForCausalLM"])


@pytest.fixture
def folder(tmp_path: Path, arrays: dict[str, Float32Array]) -> Path:
    """A whole checkpoint in one file."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    write_config(made, LLAMA)
    (made / WHOLE).write_bytes(safetensors(arrays))
    return made


def split(folder: Path, arrays: Mapping[str, Any], parts: int = 2) -> dict[str, str]:
    """The checkpoint in several files with an index; returns which tensor is in which."""
    (folder / WHOLE).unlink()
    names = [f"model-{part + 1:05}-of-{parts:05}.safetensors" for part in range(parts)]
    places = {tensor: names[at % parts] for at, tensor in enumerate(arrays)}
    for name in names:
        inside = {tensor: arrays[tensor] for tensor, place in places.items() if place == name}
        (folder / name).write_bytes(safetensors(inside))
    write_index(folder, places)
    return places


def write_index(folder: Path, places: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def refusal(folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        Checkpoint(folder)
    return str(caught.value)


# Configs


def test_a_llama_config_says_its_sizes(tmp_path: Path) -> None:
    assert shape_of(tmp_path, rope_theta=5e5, tie_word_embeddings=True) == LlamaShape(
        layers=2,
        hidden=32,
        intermediate=64,
        heads=2,
        kv_heads=1,
        vocabulary=20,
        context=512,
        rope_base=5e5,
        norm_epsilon=1e-5,
    )


def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path: Path) -> None:
    """Llama's output matrix is its own unless told otherwise, Gemma's is the embedding."""
    shape = shape_of(tmp_path)
    assert (shape.tied, shape.rope_base, shape.head_size) == (False, 1e4, 16)
    gemma = shape_of(tmp_path, GEMMA, hidden_act=None)
    assert (gemma.tied, gemma.rope_base, gemma.window_rope_base) == (True, 1e6, 1e4)
    assert (gemma.head_size, gemma.attention_scale) == (256, 1 / 16)
    assert gemma.activation == "gelu_tanh"
    assert gemma.windows == (4096, 4096, 4096, 4096, 4096, 0) * 2


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("Llama", {"sliding_window": 8}, ()),
        ("Mistral", {"sliding_window": 8}, (8, 8)),
        ("Mistral", {"sliding_window": None}, ()),
        ("Qwen2", {"sliding_window": 8}, ()),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": False}, ()),
        (
            "Qwen2",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            (0, 8),
        ),
        (
            "Qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (8, 0),
        ),
        ("Gemma3", {"sliding_window": 8, "sliding_window_pattern": 2}, (8, 0)),
        (
            "Gemma3",
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            (0, 8),
        ),
    ],
)
def test_windows(
    tmp_path: Path, name: str, changes: dict[str, Any], windows: tuple[int, ...]
) -> None:
    given = {**LLAMA, "architectures": [f"{name}ForCausalLM"], "hidden_act": None}
    assert shape_of(tmp_path, given, head_dim=16, **changes).windows == windows


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("written", "scaling"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope_type": "llama3", **LLAMA3}, RopeScaling("llama3", 8.0, 1.0, 4.0, 128)),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_is_read_from_old_and_new_configs(
    tmp_path: Path, key: str, written: dict[str, Any] | None, scaling: RopeScaling | None
) -> None:
    if key == "rope_parameters":  # since transformers 5, the base stands beside the scaling
        changes = {key: {**(written or {}), "rope_theta": 7e4}}
    else:
        changes = {key: written, "rope_theta": 7e4}
    shape = shape_of(tmp_path, **changes)
    assert (shape.rope_scaling, shape.rope_base) == (scaling, 7e4)


def test_gemmas_two_rotary_bases_are_read_from_old_and_new_configs(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 1e5, "rope_local_base_freq": 2e4, "rope_scaling": linear}
    new = {
        "full_attention": {**linear, "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    given = {**GEMMA, "hidden_act": None}
    shape = shape_of(tmp_path, given, **old)
    assert (shape.rope_base, shape.window_rope_base) == (1e5, 2e4)
    assert shape.rope_scaling == RopeScaling("linear", 8.0)
    assert shape_of(tmp_path, given, rope_parameters=new) == shape


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for named in (["GPT2LMHeadModel"], [], None, "LlamaForCausalLM", ["LlamaForCausalLM", "X"]):
        with pytest.raises(ExportError) as caught:
            shape_of(tmp_path, architectures=named)
        assert repr(named) in str(caught.value)
        for known in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3"):
            assert f"{known}ForCausalLM" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"hidden_size": None}, "hidden_size must be a whole number above 0, not None"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number above 0"),
        ({"vocab_size": 0}, "vocab_size must be a whole number above 0"),
        ({"num_key_value_heads": True}, "num_key_value_heads must be a whole number"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "a network needs"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": "fast"}, "rope_theta must be a number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu, gelu_pytorch_tanh"),
        ({"head_dim": 24}, "heads of 24 dimensions cannot be rotated"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be left out"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be left out"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "default, linear or llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "default, linear or llama3"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 5.0}},
            "0 < low_factor < high_factor",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
    ],
)
def test_a_config_that_cannot_be_exported_names_its_key(
    tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    with pytest.raises(ExportError) as caught:
        shape_of(tmp_path, **changes)
    assert cause in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"layer_types": ["full_attention"]}, "12 layers cannot have 1 windows"),
        ({"layer_types": ["chunked_attention"] * 12}, "layer_types must be a list of"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be left out"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention must be left out"),
    ],
)
def test_a_gemma_that_cannot_be_exported_names_its_key(
    tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    with pytest.raises(ExportError, match=cause):
        shape_of(tmp_path, {**GEMMA, "hidden_act": None}, **changes)


# Shapes


def test_a_shape_is_described_by_what_is_special_about_it() -> None:
    """So that a bundle of a plain Llama network reads the same as before there were others."""
    sizes = {
        "layers": 2,
        "hidden": 32,
        "intermediate": 64,
        "heads": 2,
        "kv_heads": 1,
        "vocabulary": 20,
        "context": 512,
        "rope_base": 1e4,
        "norm_epsilon": 1e-5,
    }
    plain = LlamaShape(**sizes)
    assert plain.essentials() == sizes
    assert LlamaShape(**sizes, head_size=16, tied=True) == plain
    other = LlamaShape(**sizes, head_size=32, windows=(0, 8), tied=False)
    assert other.essentials() == {**sizes, "head_size": 32, "windows": (0, 8), "tied": False}
    assert LlamaShape(**other.essentials()) == other


def test_a_shape_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(BundleError, match="2 layers cannot have 3 windows"):
        LlamaShape(2, 32, 64, 2, 1, 20, 512, 1e4, 1e-5, windows=(1, 2, 3))
    with pytest.raises(BundleError, match="a multiple"):
        LlamaShape(2, 32, 64, 3, 2, 20, 512, 1e4, 1e-5)


def test_the_default_bundles_graph_is_still_the_same() -> None:
    """Other families must not change it; the weights' hash is checked by `pull`."""
    bundle = open_bundle()
    spec = bundle.manifest.refiner
    assert spec is not None
    assert spec.precision == "int8"
    made = decoder_graph(spec.shape, len(bundle.categories), "int8", spec.context).graph
    stored = onnx.load_model_from_string(bundle.read(spec.graph)).graph
    assert list(made.node) == list(stored.node)
    assert (list(made.input), list(made.output)) == (list(stored.input), list(stored.output))
    assert [tensor.name for tensor in made.initializer] == [t.name for t in stored.initializer]
    for one, other in zip(made.initializer, stored.initializer, strict=True):
        if one.name in ("cos", "sin"):  # another machine's may differ in the last bit
            arrays = map(numpy_helper.to_array, (one, other))
            np.testing.assert_allclose(*arrays, rtol=0, atol=1e-7)
        else:
            assert one == other
    entries = layout(spec.shape, len(bundle.categories), "int8")
    assert entries[-1].offset + entries[-1].bytes == spec.weights.bytes


@pytest.mark.parametrize("columns", [1, 4095, 4096, 4097, 9000])
def test_a_wide_matrix_is_quantised_in_pieces_as_it_is_at_once(columns: int) -> None:
    matrix = np.random.default_rng(columns).standard_normal((6, columns)).astype(np.float32)
    matrix[:, 0] = 0
    quantised, scale = quantise(matrix)
    for at in {0, columns // 2, columns - 1}:
        alone, step = quantise(matrix[:, at : at + 1])
        np.testing.assert_array_equal(quantised[:, at], alone[:, 0])
        assert scale[at] == step[0]


@pytest.mark.parametrize("half", [8, 32])
def test_llama3_slows_down_what_turns_slowly(half: int) -> None:
    plain = rotary_rates(1e4, 2 * half, None)
    slowed = rotary_rates(1e4, 2 * half, RopeScaling("llama3", 8.0, 1.0, 4.0, 128))
    wavelength = 2 * np.pi / plain
    fast, slow = wavelength < 128 / 4, wavelength > 128
    np.testing.assert_allclose(slowed[fast], plain[fast])
    np.testing.assert_allclose(slowed[slow], plain[slow] / 8)
    between = ~fast & ~slow
    assert ((slowed < plain) & (slowed > plain / 8))[between].all()
    assert fast.any() and slow.any() and between.any()


# Tensors


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_tensors_are_read_from_one_file_or_several(
    folder: Path, arrays: dict[str, Float32Array], parts: int
) -> None:
    if parts > 1:
        split(folder, arrays, parts)
    network = Checkpoint(folder)
    assert len(network.tensors.files) == parts
    np.testing.assert_array_equal(network.embedding(), arrays["model.embed_tokens.weight"])
    np.testing.assert_array_equal(network.output(), arrays["lm_head.weight"])
    np.testing.assert_array_equal(network.final_norm(), arrays["model.norm.weight"])
    for layer in range(2):
        for name in LINEARS:
            expected = arrays[f"model.layers.{layer}.{name}.weight"]
            np.testing.assert_array_equal(network.linear(layer, name), expected)
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected = arrays[f"model.layers.{layer}.{name}.weight"]
            np.testing.assert_array_equal(network.norm(layer, name), expected)


def test_half_precisions_are_widened(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 0.0, 3.140625], np.float32)
    upper_halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    for kind, stored in (("F16", values.astype(np.float16)), ("BF16", upper_halves)):
        (tmp_path / WHOLE).write_bytes(safetensors({"x": stored}, kind))
        found = TensorFolder(tmp_path).tensor("x")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    (tmp_path / WHOLE).write_bytes(safetensors({"x": np.array([1, value], np.float32)}))
    with pytest.raises(ExportError, match=r"x in .* holds a value that is not finite"):
        TensorFolder(tmp_path).tensor("x")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "none")
    assert "config.json is missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "holds a list, not an object" in refusal(tmp_path)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / WHOLE).unlink()
    assert "has neither model.safetensors nor" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    message = refusal(folder)
    assert "pytorch_model.bin: pickled files can run any code and are not read" in message
    assert "save the checkpoint as safetensors" in message


def test_a_missing_shard_is_named(folder: Path, arrays: dict[str, Float32Array]) -> None:
    lost = split(folder, arrays)["model.norm.weight"]
    (folder / lost).unlink()
    assert f"{lost} is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_leaves_the_folder_is_refused(
    folder: Path, arrays: dict[str, Float32Array], name: str
) -> None:
    places = split(folder, arrays)
    (folder.parent / "model.safetensors").write_bytes(safetensors(arrays))
    write_index(folder, {**places, "model.norm.weight": name})
    assert f"names {name!r}, which is not a plain file name" in refusal(folder)


@pytest.mark.parametrize("contents", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_places_is_refused(folder: Path, contents: str) -> None:
    (folder / WHOLE).unlink()
    (folder / INDEX).write_text(contents)
    assert str(folder / INDEX) in refusal(folder)


def test_an_index_that_differs_from_its_files_is_refused(
    folder: Path, arrays: dict[str, Float32Array]
) -> None:
    places = split(folder, arrays)
    del places["model.norm.weight"]
    write_index(folder, places)
    assert "differ in model.norm.weight" in refusal(folder)


@pytest.mark.parametrize("name", [WHOLE, "config.json"])
def test_a_link_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).replace(outside)
    (folder / name).symlink_to(outside)
    assert f"{folder / name} is a link that leaves its folder" in refusal(folder)


def test_a_link_within_the_folder_will_do(folder: Path) -> None:
    (folder / WHOLE).replace(folder / "own.safetensors")
    (folder / WHOLE).symlink_to("own.safetensors")
    assert Checkpoint(folder).shape.layers == 2


def test_missing_tensors_are_named(folder: Path, arrays: dict[str, Float32Array]) -> None:
    del arrays["model.layers.1.mlp.up_proj.weight"]
    (folder / WHOLE).write_bytes(safetensors(arrays))
    assert "lacks model.layers.1.mlp.up_proj.weight, which config.json asks for" in refusal(folder)
    (folder / WHOLE).write_bytes(safetensors({}))
    assert "and 17 more" in refusal(folder)


def test_tensors_of_which_the_config_says_nothing_are_named(
    folder: Path, arrays: dict[str, Float32Array]
) -> None:
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"):
        (folder / WHOLE).write_bytes(safetensors({**arrays, name: np.zeros(3, np.float32)}))
        assert f"has {name}, of which config.json says nothing" in refusal(folder)


def test_rotary_rates_that_older_checkpoints_kept_are_left_out(
    folder: Path, arrays: dict[str, Float32Array]
) -> None:
    kept = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    (folder / WHOLE).write_bytes(safetensors({**arrays, **kept}))
    assert Checkpoint(folder).shape.layers == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 21}, "model.embed_tokens.weight in .* has the shape [20, 32]"),
        ({"intermediate_size": 48}, "describes [48, 32]"),
        ({"head_dim": 32}, "describes [64, 32]"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2."),
        ({"num_hidden_layers": 1}, "has model.layers.1."),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    folder: Path, changes: dict[str, Any], named: str
) -> None:
    write_config(folder, {**LLAMA, **changes})
    message = refusal(folder)
    for part in named.split(" .* "):
        assert part in message


def test_an_output_that_is_the_embedding_once_more_will_do(
    folder: Path, arrays: dict[str, Float32Array]
) -> None:
    write_config(folder, {**LLAMA, "tie_word_embeddings": True})
    assert "is not its embedding, and config.json says that they are one" in refusal(folder)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    (folder / WHOLE).write_bytes(safetensors(arrays))
    assert Checkpoint(folder).shape.tied


def test_files_cut_short_anywhere_are_refused(folder: Path) -> None:
    whole = (folder / WHOLE).read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (folder / WHOLE).write_bytes(whole[:length])
        assert f"{folder / WHOLE} ends early or is no safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ({"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, "x is I8, not one of F32, F16"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}, "the bytes of its shape [1]"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "x lies outside the file"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "x lies outside the file"),
        ({"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}, "x lies outside the file"),
        ({"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, "no safetensors file"),
        ({"dtype": "F32", "shape": [2]}, "no safetensors file"),
        ([], "no safetensors file"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, entry: Any, cause: str) -> None:
    header = json.dumps({"x": entry}).encode()
    (tmp_path / WHOLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ExportError) as caught:
        TensorFolder(tmp_path)
    assert cause in str(caught.value)


# Bundles with weights of their own


def own_weights(folder: Path, **refiner: Any) -> Path:
    """The tiny bundle whose refiner has its weights in it, and neither base nor delta."""
    weights = {WEIGHTS: tiny_refiner.weights_file("int8")}
    values = {"base": None, "delta": None, **refiner}
    return tiny_refiner.write_bundle(folder, refiner=values, replaced=weights)


def test_weights_in_the_bundle_need_no_pull(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "cache"))
    folder = own_weights(tmp_path / "own")
    assert pull(open_bundle(folder)) == folder / WEIGHTS
    with lance_edge.load(folder, "cpu", threads=1) as guard:
        assert guard.refine("hello the bomb").steps
    assert not (tmp_path / "cache").exists()


def test_weights_that_were_lost_are_the_bundles(tmp_path: Path) -> None:
    folder = own_weights(tmp_path / "own")
    (folder / WEIGHTS).unlink()
    with pytest.raises(BundleFileMissing, match="copy the whole bundle again"):
        pull(open_bundle(folder))


def test_a_refiner_has_weights_or_what_they_are_made_of(tmp_path: Path) -> None:
    half = own_weights(tmp_path / "half", delta="refiner_delta.npz")
    with pytest.raises(BundleError, match="needs both a base and a delta, or neither"):
        open_bundle(half)
    none = tiny_refiner.write_bundle(tmp_path / "none", refiner={"base": None, "delta": None})
    with pytest.raises(BundleError, match="neither weights nor a base"):
        open_bundle(none)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"tied": "yes"}, "tied must be true or false, not 'yes'"),
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh"),
        ({"windows": [1, "2"]}, "windows must be a whole number"),
        ({"windows": [1]}, "2 layers cannot have 1 windows"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "kind must be one of linear, llama3"),
        ({"rope_scaling": {"kind": "linear"}}, "RopeScaling lacks factor"),
        ({"softcap": 3.0}, "keys this version does not know: softcap"),
    ],
)
def test_a_manifest_with_a_shape_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    shape = {**tiny_refiner.SHAPE.essentials(), **changes}
    folder = tiny_refiner.write_bundle(tmp_path / "own", refiner={"shape": shape})
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert cause in str(caught.value)


def test_a_manifest_may_name_all_that_a_shape_has(tmp_path: Path) -> None:
    shape = {**tiny_refiner.SHAPE.essentials(), "head_size": 32, "tied": True, "windows": [0, 9]}
    scaled = {**shape, "rope_scaling": {"kind": "linear", "factor": 2.0}}
    folder = tiny_refiner.write_bundle(tmp_path / "own", refiner={"shape": scaled})
    spec = open_bundle(folder).manifest.refiner
    assert spec is not None
    expected = replace(tiny_refiner.SHAPE, windows=(0, 9), rope_scaling=RopeScaling("linear", 2.0))
    assert spec.shape == expected


def test_a_second_look_that_counts_nothing_is_refused_when_asked_for(tmp_path: Path) -> None:
    files = tiny_refiner.files()
    look = {**json.loads(files["second_look.json"]), "share": 0.0}
    folder = tiny_refiner.write_bundle(
        tmp_path / "own", replaced={"second_look.json": json.dumps(look).encode()}
    )
    with pytest.raises(InvalidOption, match="has no second look; choose looks auto or 1"):
        lance_edge.load(folder, "cpu", looks="2")
