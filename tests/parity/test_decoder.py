"""The refiner's graph on tiny weights: what it computes, and that steps do not matter."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_refiner
from tiny_refiner import SHAPE

from lance_edge.bundle import Calibration
from lance_edge.decoder import Cache, Decoder, Step
from lance_edge.refiner import Refiner, generate, longest_rewrite
from lance_edge.weights import Array, Precision, hadamard, merge

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
NAMES = [f"{kind}.{layer}" for layer in range(SHAPE.layers) for kind in ("key", "value")]
END = 2  # <|im_end|>

STATE_TOLERANCE = 1e-4  # fp32, another order of summation; states are about 1
INT8_ERROR = 0.08  # of the state's length: eight products one after the other, about 1 % each


def random_ids(count: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, SHAPE.vocabulary, count).tolist()
    return ids


@cache
def decoder(precision: Precision) -> Decoder:
    return tiny_refiner.decoder(precision, prefix=tiny_refiner.prefix())


@cache
def state_decoder(precision: Precision) -> Decoder:
    """Its second look's mean is the final state itself: the head is the identity."""
    head = {
        "look.mean": np.eye(SHAPE.hidden, dtype=np.float32),
        "look.mean.bias": np.zeros(SHAPE.hidden, np.float32),
        "look.deviation": np.zeros((SHAPE.hidden, SHAPE.hidden), np.float32),
        "look.deviation.bias": np.zeros(SHAPE.hidden, np.float32),
    }
    return tiny_refiner.decoder(precision, changes=head)


def contents(read: Cache) -> dict[str, Array]:
    """The keys and values that are kept, by name."""
    return {name: read.state.read(name)[:, :, : read.length] for name in NAMES}


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in NAMES)


def states(precision: Precision, ids: Sequence[int]) -> Array:
    """The final state after every second token  [tokens / 2, hidden]"""
    reader = state_decoder(precision)
    read = reader.start(len(ids))
    steps = [reader.step(read, ids[at : at + 2], 1) for at in range(0, len(ids), 2)]
    return np.stack([step.mean for step in steps])


# Against other implementations


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The base in transformers, with the deltas added to its weights."""
    torch = pytest.importorskip("torch", reason="needs torch (the train extra)")
    pytest.importorskip("transformers", reason="needs transformers (the train extra)")
    from lance_edge_training.base_model import load_base

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only waits for other threads
    model = load_base(tiny_refiner.write_base(tmp_path_factory.mktemp("bases")))
    with torch.no_grad():
        for name, weight in tiny_refiner.checkpoint().items():
            short = name.removeprefix("model.layers.")
            merged = torch.from_numpy(merge(weight, tiny_refiner.delta(), short))
            model.get_parameter(f"{name}.weight").copy_(merged)
    yield model
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected(llama: Any) -> Any:
    """What transformers computes of 80 tokens: states, tokens, keys and values."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([random_ids(80, seed=1)])
        output = llama.model(ids, use_cache=True)
        tokens = llama.lm_head(output.last_hidden_state)[0].argmax(-1)
    return output, tokens.tolist()


@pytest.mark.train
def test_fp32_tokens_are_those_of_transformers(expected: Any) -> None:
    reader = state_decoder("fp32")
    step = reader.step(reader.start(80), random_ids(80, seed=1))
    _, tokens = expected
    assert step.tokens == tokens
    assert len(set(tokens)) > 20


@pytest.mark.train
def test_fp32_log_probabilities_are_those_of_transformers(llama: Any, expected: Any) -> None:
    import torch

    output, _ = expected
    with torch.inference_mode():
        likely = llama.lm_head(output.last_hidden_state)[0].log_softmax(-1).amax(-1)
    reader = state_decoder("fp32")
    step = reader.step(reader.start(80), random_ids(80, seed=1))
    np.testing.assert_allclose(step.log_probabilities, likely.numpy(), rtol=0, atol=1e-4)
    last = reader.step(reader.start(80), random_ids(80, seed=1), first=79)
    np.testing.assert_allclose(last.log_probabilities, step.log_probabilities[79:], atol=1e-4)


@pytest.mark.train
def test_fp32_states_are_those_of_transformers(expected: Any) -> None:
    output, _ = expected
    theirs = output.last_hidden_state[0, 1::2].numpy()
    np.testing.assert_allclose(
        states("fp32", random_ids(80, seed=1)), theirs, rtol=0, atol=STATE_TOLERANCE
    )


@pytest.mark.train
def test_fp32_keys_and_values_are_those_of_transformers(expected: Any) -> None:
    """The graph's values are rotated within a head (`make_weights`)."""
    output, _ = expected
    reader = state_decoder("fp32")
    read = reader.start(80)
    reader.step(read, random_ids(80, seed=1))
    kept = contents(read)
    for layer, theirs in enumerate(output.past_key_values.layers):
        np.testing.assert_allclose(
            kept[f"key.{layer}"], theirs.keys.numpy(), rtol=0, atol=STATE_TOLERANCE
        )
        np.testing.assert_allclose(
            hadamard(kept[f"value.{layer}"]), theirs.values.numpy(), rtol=0, atol=STATE_TOLERANCE
        )


@pytest.mark.train
def test_the_deltas_matter(expected: Any, tmp_path: Path) -> None:
    """Else the tests above would not see whether they are merged."""
    import torch

    from lance_edge_training.base_model import load_base

    base = load_base(tiny_refiner.write_base(tmp_path))
    with torch.inference_mode():
        plain = base.model(torch.tensor([random_ids(80, seed=1)])).last_hidden_state
    output, _ = expected
    assert (plain - output.last_hidden_state).abs().mean() > 100 * STATE_TOLERANCE


@pytest.mark.train
def test_the_tiny_bundle_is_what_the_export_writes(tmp_path: Path) -> None:
    """The tests' own helper, which imports no torch, against the export's functions."""
    pytest.importorskip("torch", reason="needs torch (the export extra)")
    from lance_edge_export.refiner import prefix_arrays, write_weights
    from lance_edge_training.base_model import base_tokenizer
    from lance_edge_training.refiner import TEMPLATE

    for precision in PRECISIONS:
        contents = tiny_refiner.weights_file(precision)
        path = tmp_path / precision
        found = write_weights(path, tiny_refiner.network(), tiny_refiner.delta(), 3, precision)
        assert path.read_bytes() == contents
        assert (found.sha256, found.bytes) == (hashlib.sha256(contents).hexdigest(), len(contents))
    prefix = prefix_arrays(tiny_refiner.decoder("fp32")._session, tiny_refiner.language())
    assert same(prefix, tiny_refiner.prefix())
    assert base_tokenizer(tiny_refiner.write_base(tmp_path)).to_str() == (
        tiny_refiner.tokenizer().to_str()
    )
    assert tiny_refiner.TEMPLATE == TEMPLATE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_second_look_is_its_head_on_the_state(precision: Precision) -> None:
    ids, delta = random_ids(60, seed=2), tiny_refiner.delta()
    reader = tiny_refiner.decoder(precision)
    read = reader.start(len(ids))
    for at, state in zip(range(0, len(ids), 2), states(precision, ids), strict=True):
        step = reader.step(read, ids[at : at + 2], 1)
        mean = state @ delta["look.mean"] + delta["look.mean.bias"]
        raw = state @ delta["look.deviation"] + delta["look.deviation.bias"]
        np.testing.assert_allclose(step.mean, mean, rtol=0, atol=STATE_TOLERANCE)
        np.testing.assert_allclose(
            step.deviation, np.log1p(np.exp(raw)) + 1e-3, rtol=0, atol=STATE_TOLERANCE
        )
        assert (step.deviation > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_int8_states_are_close_to_those_of_fp32(seed: int) -> None:
    ids = random_ids(80, seed)
    exact, rounded = states("fp32", ids), states("int8", ids)
    error = np.linalg.norm(rounded - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.median(error) < INT8_ERROR
    assert error.max() < 3 * INT8_ERROR
    assert error.min() > 1e-4  # it is int8 that was run


# Steps


def as_bytes(step: Step) -> bytes:
    return step.mean.tobytes() + step.deviation.tobytes()


def read_in_steps(
    reader: Decoder, ids: Sequence[int], sizes: Sequence[int], spare: int = 0
) -> tuple[dict[str, Array], list[int], dict[int, bytes]]:
    """Kept arrays, next tokens, and the looks at each step's first token, as bytes by the number of
    tokens up to it.

    sizes  of the steps, again and again; the last step is shorter
    """
    read = reader.start(len(ids) + spare)
    start = read.length
    tokens: list[int] = []
    looks: dict[int, bytes] = {}
    for size in cycle(sizes):
        new = ids[read.length - start :][:size]
        at = read.length - start + 1
        step = reader.step(read, new)
        tokens += step.tokens
        looks[at] = as_bytes(step)
        if read.length - start == len(ids):
            return contents(read), tokens, looks
    raise AssertionError("there is no size")


@cache
def at_once(precision: Precision) -> tuple[dict[str, Array], list[int]]:
    kept, tokens, _ = read_in_steps(decoder(precision), random_ids(90, seed=5), [90])
    return kept, tokens


@cache
def every_look(precision: Precision) -> dict[int, bytes]:
    """After each number of tokens, read two by two."""
    ids = random_ids(90, seed=5)
    _, _, even = read_in_steps(decoder(precision), ids, [2])
    _, _, odd = read_in_steps(decoder(precision), ids, [1, *[2] * 45])
    return {**even, **odd}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "sizes", [[1], [2], [3], [4], [5], [7], [8], [16], [17], [33], [1, 17, 2, 8], [89]], ids=str
)
def test_a_token_does_not_depend_on_the_step_it_is_in(
    precision: Precision, sizes: list[int]
) -> None:
    """Bit by bit: else a draft could change what is written."""
    kept, tokens = at_once(precision)
    found, found_tokens, looks = read_in_steps(decoder(precision), random_ids(90, seed=5), sizes)
    assert found_tokens == tokens
    for name in NAMES:
        assert np.array_equal(found[name], kept[name]), name
    assert looks == {end: every_look(precision)[end] for end in looks}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_looks_of_a_single_token_are_read_at_it(precision: Precision) -> None:
    """Not at the one that is run beside it and never kept."""
    ids = random_ids(90, seed=5)[:7]
    reader = decoder(precision)
    read = reader.start(7)
    reader.step(read, ids[:6])
    assert as_bytes(reader.step(read, ids[6:])) == every_look(precision)[7]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("length", [32, 33, 63, 64, 65, 66, 127, 128, 129, 193])
def test_the_last_token_of_a_long_step_is_computed_as_the_others_are(
    precision: Precision, length: int
) -> None:
    """An attention kernel that goes by blocks of rows may be left with a single one."""
    ids = random_ids(length, seed=5)
    reader = state_decoder(precision)
    long, short = reader.start(length), reader.start(length)
    state = reader.step(long, ids, length - 1).mean
    reader.step(short, ids[: length - 3])
    np.testing.assert_array_equal(state, reader.step(short, ids[length - 3 :], 2).mean)
    assert same(contents(long), contents(short))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spare", [1, 7, 64, 500])
def test_a_token_does_not_depend_on_the_caches_size(precision: Precision, spare: int) -> None:
    kept, tokens = at_once(precision)
    found, found_tokens, _ = read_in_steps(
        decoder(precision), random_ids(90, seed=5), [17, 3], spare
    )
    assert found_tokens == tokens
    assert same(found, kept)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_the_wanted_tokens_are_given(precision: Precision) -> None:
    ids = random_ids(12, seed=6)
    reader = decoder(precision)
    tokens = reader.step(reader.start(12), ids).tokens
    for first in (0, 1, 5, 11):
        assert reader.step(reader.start(12), ids, first).tokens == tokens[first:]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kept", [0, 1, 9, 30])
def test_what_was_rolled_back_leaves_no_trace(precision: Precision, kept: int) -> None:
    before, rejected, after = random_ids(kept, 7), random_ids(40, 8), random_ids(21, 9)
    reader = decoder(precision)
    read = reader.start(80)
    length = read.length
    for ids in (before, rejected):
        if ids:
            reader.step(read, ids)
    read.rollback(length + kept)
    step = reader.step(read, after)
    fresh, tokens, _ = read_in_steps(reader, [*before, *after], [len(before) or 21, 21])
    assert same(contents(read), fresh)
    assert step.tokens == tokens[kept:]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_spare_place_of_a_single_token_leaves_no_trace(precision: Precision) -> None:
    """A step of one token is run as two; the second is never kept."""
    reader = decoder(precision)
    read = reader.start(3)
    ids = random_ids(3, 10)
    tokens = [reader.step(read, [token]).tokens for token in ids]
    assert read.length == read.capacity - 1
    whole = reader.start(3)
    assert reader.step(whole, ids).tokens == [token for (token,) in tokens]
    assert same(contents(read), contents(whole))


def test_two_caches_do_not_share_anything() -> None:
    reader, ids = decoder("int8"), random_ids(20, 11)
    one, other = reader.start(20), reader.start(20)
    for token in ids:
        reader.step(one, [token])
        reader.step(other, [SHAPE.vocabulary + 2 - token])
    fresh, _, _ = read_in_steps(reader, ids, [20])
    assert same(contents(one), fresh)
    assert not same(contents(other), fresh)


def test_a_cache_longer_than_the_context_is_refused() -> None:
    reader = decoder("int8")
    room = tiny_refiner.CONTEXT - len(tiny_refiner.language().prefix) - 1
    assert reader.start(room).capacity == tiny_refiner.CONTEXT
    with pytest.raises(ValueError, match="1025 tokens do not fit a context of 1024"):
        reader.start(room + 1)


# The stored prefix


def test_the_stored_prefix_is_what_reading_it_gives() -> None:
    """In fp32 bit by bit."""
    opening, ids = tiny_refiner.language().prefix, random_ids(30, 12)
    sizes = [len(opening), len(ids)]
    whole, tokens, looks = read_in_steps(tiny_refiner.decoder("fp32"), [*opening, *ids], sizes)
    stored, stored_tokens, stored_looks = read_in_steps(decoder("fp32"), ids, [30])
    assert same(stored, whole)
    assert stored_tokens == tokens[len(opening) :]
    assert list(stored_looks.values()) == [looks[len(opening) + 1]]


def test_int8_goes_on_from_the_prefix_that_fp32_read() -> None:
    """The bundle stores one prefix; int8 would read it almost the same."""
    reader = decoder("int8")
    kept = contents(reader.start(10))
    for name, array in tiny_refiner.prefix().items():
        np.testing.assert_array_equal(kept[name], array)
    opening, ids = tiny_refiner.language().prefix, random_ids(30, 12)
    whole, _, _ = read_in_steps(tiny_refiner.decoder("int8"), [*opening, *ids], [100])
    stored, _, _ = read_in_steps(reader, ids, [30])
    for name in NAMES:
        size = np.abs(whole[name]).max()
        assert np.abs(stored[name] - whole[name]).mean() < INT8_ERROR * size


# Drafts


def edited(ids: Sequence[int], rng: random.Random) -> list[int]:
    """The ids with some left out, replaced or put in: what a rewrite's source looks like."""
    result: list[int] = []
    for token in ids:
        change = rng.random()
        if change < 0.1:
            continue
        result.append(token if change > 0.2 else rng.randrange(3, SHAPE.vocabulary))
        if change > 0.9:
            result.append(rng.randrange(3, SHAPE.vocabulary))
    return result


@pytest.mark.parametrize("part", range(4))
def test_drafts_do_not_change_what_is_written(part: int) -> None:
    """200 prompts in all. The sources are edited outputs, so that drafts hold and fail."""
    rng = random.Random(part)
    reader = decoder("int8")
    steps = drafted = agreed = written = 0
    for case in range(50):
        prompt = random_ids(rng.randint(2, 30), seed=1000 * part + case)
        opening = random_ids(rng.randint(1, 9), seed=5000 + case)
        limit = rng.randint(1, 24)
        read = reader.start(100)
        reader.step(read, prompt)
        length = read.length

        def write(source: tuple[int, ...], speculative: bool) -> Any:
            read.rollback(length)  # noqa: B023 - called in this round only
            return generate(reader, read, opening, source, limit, speculative)  # noqa: B023

        output, counts, likely = write((*prompt, END), False)
        assert counts == (len(output), 0, 0)
        end = END
        if case % 3 == 0:  # few of these networks' outputs come to an end: choose one that does
            end = rng.choice(output)
            output = output[: output.index(end) + 1]
            again, _, likely = write((*prompt, end), False)
            assert again == output
        source = edited(output, rng) if case % 4 else prompt
        found, counts, drafted_likely = write((*source, end), True)
        assert found == output
        assert drafted_likely == pytest.approx(likely, abs=1e-3)
        steps, drafted, agreed = steps + counts[0], drafted + counts[1], agreed + counts[2]
        written += len(found)
    assert steps < 0.85 * written  # drafts do save steps
    assert 0.2 * drafted < agreed < 0.8 * drafted


def test_a_refiner_writes_the_same_with_and_without_drafts() -> None:
    neutral = [Calibration(slope=1.0, intercept=0.0, threshold=0.5)] * 3
    language = tiny_refiner.language()
    refiner = Refiner(decoder("int8"), language, neutral, tiny_refiner.PROMPT_TOKENS, 0.5)
    for prompt in ("hello the bomb", "a", "日本語 the", "x" * tiny_refiner.PROMPT_TOKENS):
        reading = refiner.read(prompt)
        fast = refiner.rewrite(reading, "no violence")
        plain = refiner.rewrite(reading, "no violence", speculative=False)
        assert (fast.ids, fast.text, fast.ended) == (plain.ids, plain.text, plain.ended)
        assert len(fast.ids) <= longest_rewrite(len(reading.prompt))
        assert language.end not in fast.ids
        assert plain.drafted == 0
