"""`lance-edge pack`: copies that need nothing else, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import keys
import pytest
import tiny
import tiny_refiner
from typer.testing import CliRunner

import lance_edge
from lance_edge import cli
from lance_edge.bundle import open_bundle
from lance_edge.cache import weights_path
from lance_edge.verify import check_goldens
from lance_edge.weights import WEIGHTS
from lance_edge_export import portable


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, empty."""
    monkeypatch.setenv("LANCE_EDGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_refiner.write_bundle(tmp_path / "own")


@pytest.fixture
def weights(bundle: Path) -> Path:
    """The refiner's weights, as if pulled; returns their path."""
    opened = open_bundle(bundle)
    assert opened.manifest.refiner is not None
    path = weights_path(opened, opened.manifest.refiner)
    path.write_bytes(tiny_refiner.weights_file("int8"))
    return path


def pack(bundle: Path, out: Path, *options: str | Path) -> Any:
    arguments = ["pack", bundle, "--out", out, *options]
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if folder.name + "." in path.name)


# What is in it


def test_a_packed_bundle_refines_with_nothing_pulled(
    bundle: Path, weights: Path, tmp_path: Path
) -> None:
    with lance_edge.load(bundle, "cpu", threads=1) as guard:
        expected = guard.refine("bomb").to_dict()
    out = tmp_path / "packed"
    done = pack(bundle, out)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"wrote {out}\n", "")
    weights.unlink()
    with lance_edge.load(out, "cpu", threads=1) as guard:
        found = guard.refine("bomb").to_dict()
    for values in (expected, found):
        del values["timings"], values["bundle"]
    assert found == expected
    before, after = (
        json.loads((folder / "manifest.json").read_bytes()) for folder in (bundle, out)
    )
    size = len(tiny_refiner.weights_file("int8"))
    assert after["files"].pop(WEIGHTS)["bytes"] == size
    assert after == before
    assert WEIGHTS in open_bundle(out).verify()


def test_without_weights_it_is_the_same_bundle(bundle: Path, weights: Path, tmp_path: Path) -> None:
    (bundle / "notes.txt").write_text("not the bundle's", encoding="utf-8")
    assert pack(bundle, tmp_path / "packed", "--without-weights").exit_code == 0
    expected = contents(bundle)
    del expected["notes.txt"]
    assert contents(tmp_path / "packed") == expected


def test_weights_can_be_packed_on_and_taken_out_again(
    bundle: Path, weights: Path, tmp_path: Path
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert pack(bundle, first).exit_code == 0
    weights.unlink()
    assert pack(first, second).exit_code == 0
    assert contents(second) == contents(first)
    assert pack(second, third, "--without-weights").exit_code == 0
    opened = open_bundle(third)
    assert WEIGHTS not in contents(third) and WEIGHTS not in opened.manifest.files


def test_a_bundle_without_a_refiner_needs_no_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    assert pack(tiny_bundle, tmp_path / "packed").exit_code == 0
    assert contents(tmp_path / "packed") == contents(tiny_bundle)


# Another taxonomy


def describe(bundle: Path, path: Path, **actions: str) -> Path:
    """The bundle's taxonomy in a file, in another order, with other actions."""
    entries = json.loads((bundle / "taxonomy.json").read_bytes())
    changed = [{**e, "action": actions.get(e["name"], e["action"])} for e in reversed(entries)]
    path.write_text(json.dumps(changed), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("output_format", "inside"),
    [("bundle", ["."]), ("triton", ["pipeline/1/bundle", "refiner/1/bundle"])],
)
def test_other_actions_are_packed_with_goldens_and_a_card_that_agree(
    bundle: Path, weights: Path, tmp_path: Path, output_format: str, inside: list[str]
) -> None:
    taxonomy = describe(bundle, tmp_path / "taxonomy.json", violence="review")
    out = tmp_path / "packed"
    done = pack(bundle, out, "--format", output_format, "--taxonomy", taxonomy)
    assert done.exit_code == 0, done.stderr
    for folder in inside:
        opened = open_bundle(out / folder)
        opened.verify()
        names = [category.name for category in open_bundle(bundle).categories]
        assert [category.name for category in opened.categories] == names
        assert "| violence | Violence | review |" in (out / folder / "README.md").read_text("utf-8")
        goldens = json.loads(opened.read("goldens.json"))
        with lance_edge.load(out / folder, "cpu", threads=1) as guard:
            assert guard.refine("bomb").decision == "review"
            said = [guard.screen(golden["prompt"]).decision for golden in goldens]
        assert said == [golden["decision"] for golden in goldens] != []


def test_packed_goldens_are_of_the_first_look(
    bundle: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a second look would be open, and where bundles must be signed and this one is not yet."""
    pytest.importorskip("cryptography", reason="needs cryptography (the sign extra)")
    look = json.loads((bundle / "second_look.json").read_bytes())
    always = json.dumps({**look, "low": -1e9, "high": 1e9, "share": 0.5}).encode()
    source = tiny_refiner.write_bundle(tmp_path / "open", replaced={"second_look.json": always})
    private, public = keys.write_key(tmp_path / "key")
    out = tmp_path / "packed"
    taxonomy = describe(source, tmp_path / "taxonomy.json", violence="review")
    assert pack(source, tmp_path / "signed", "--sign", private).exit_code == 0
    monkeypatch.setenv("LANCE_EDGE_PUBLIC_KEY", str(public))
    done = pack(tmp_path / "signed", out, "--taxonomy", taxonomy, "--sign", private)
    assert done.exit_code == 0, done.stderr
    with lance_edge.load(out, "cpu", threads=1, looks="1") as guard:
        check = check_goldens(guard)
    assert check.passed and check.prompts
    with lance_edge.load(out, "cpu", threads=1) as guard:
        assert guard.screen("bomb").look == 2


def test_what_a_taxonomy_does_not_say_stays(bundle: Path, weights: Path, tmp_path: Path) -> None:
    before = open_bundle(bundle).categories
    assert any(category.mlcommons for category in before)
    told = [{"name": c.name, "title": c.title.upper(), "action": "review"} for c in before]
    path = tmp_path / "taxonomy.json"
    path.write_text(json.dumps(told), encoding="utf-8")
    assert pack(bundle, tmp_path / "packed", "--taxonomy", path).exit_code == 0
    after = open_bundle(tmp_path / "packed").categories
    assert after == tuple(replace(c, title=c.title.upper(), action="review") for c in before)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("[", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "a taxonomy is a list of objects, each with a name"),
        ('[{"name": "violence", "title": "V", "action": "shrug"}]', "not shrug"),
        ('[{"name": "violence", "title": "V", "action": "block"}]', "each once: violence, privacy"),
        (
            '[{"name": "violence", "title": "V", "action": "block", "colour": 1}]',
            "has no colour; it has",
        ),
        (
            '[{"name": "a", "title": "V", "action": "block", "openai": "x"}]',
            "openai of a must be a list",
        ),
    ],
)
def test_a_taxonomy_of_other_categories_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, contents: str, message: str
) -> None:
    path = tmp_path / "taxonomy.json"
    path.write_text(contents, encoding="utf-8")
    done = pack(tiny_bundle, tmp_path / "packed", "--taxonomy", path)
    assert done.exit_code != 0
    assert message in done.stderr and str(path) in done.stderr
    assert not (tmp_path / "packed").exists() and not left(tmp_path / "packed")


def test_a_taxonomy_that_is_no_text_is_named_once(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "taxonomy.json"
    path.write_bytes(b"[\xff")
    done = pack(tiny_bundle, tmp_path / "packed", "--taxonomy", path)
    assert done.stderr == f"lance-edge: {path} is not valid UTF-8 (byte 2)\n"


# What is refused


def test_weights_that_were_never_pulled_are_an_error(bundle: Path, tmp_path: Path) -> None:
    done = pack(bundle, tmp_path / "packed")
    assert done.exit_code == 3
    assert "run `lance-edge pull` once" in done.stderr
    assert not (tmp_path / "packed").exists() and not left(tmp_path / "packed")


def test_damaged_weights_are_an_error(bundle: Path, weights: Path, tmp_path: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    done = pack(bundle, tmp_path / "packed")
    assert done.exit_code == 3
    assert f"{weights} does not have the SHA-256 that the manifest says" in done.stderr
    assert not (tmp_path / "packed").exists() and not left(tmp_path / "packed")


def test_a_damaged_file_leaves_what_was_packed_before(
    bundle: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "packed"
    assert pack(bundle, out).exit_code == 0
    before = contents(out)
    (bundle / "screener.onnx").write_bytes(b"other")
    done = pack(bundle, out)
    assert done.exit_code == 3
    assert "screener.onnx has 5 bytes" in done.stderr
    assert contents(out) == before and not left(out)


def test_a_manifest_that_changes_under_the_copy_is_an_error(tmp_path: Path) -> None:
    own = tiny.write_bundle(tmp_path / "own")
    opened = open_bundle(own)
    tiny.write_bundle(own, window=12)
    with pytest.raises(lance_edge.BundleCorrupt, match="changed while it was copied"):
        portable.copy_bundle(opened, tmp_path / "packed", with_weights=True)


@pytest.mark.parametrize("output_format", ["bundle", "triton"])
def test_only_an_earlier_pack_is_replaced(
    tiny_bundle: Path, tmp_path: Path, output_format: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):  # into an empty folder, then over the first
        assert pack(tiny_bundle, out, "--format", output_format).exit_code == 0
    assert not left(out)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "letter.txt").write_text("dear", encoding="utf-8")
    for place in (theirs, theirs / "letter.txt"):
        done = pack(tiny_bundle, place, "--format", output_format)
        assert done.exit_code == 2
        assert f"--out {place} holds something else than a packed {output_format}" in done.stderr
    assert contents(theirs) == {"letter.txt": b"dear"}


# Signatures


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, Path]:
    """A private key and its public one."""
    pytest.importorskip("cryptography", reason="cryptography is not installed (the sign extra)")
    return keys.write_key(tmp_path / "key")


@pytest.mark.parametrize(
    ("output_format", "inside"),
    [("bundle", ["."]), ("triton", ["pipeline/1/bundle", "refiner/1/bundle"])],
)
def test_what_is_packed_can_be_signed(
    bundle: Path,
    weights: Path,
    tmp_path: Path,
    key: tuple[Path, Path],
    output_format: str,
    inside: list[str],
) -> None:
    out = tmp_path / "packed"
    done = pack(bundle, out, "--format", output_format, "--sign", key[0])
    assert done.exit_code == 0, done.stderr
    for folder in inside:
        lance_edge.load(out / folder, "cpu", public_key=key[1]).close()
        changed = bytearray((out / folder / WEIGHTS).read_bytes())
        changed[0] ^= 1
        (out / folder / WEIGHTS).write_bytes(changed)
        with pytest.raises(lance_edge.BundleUntrusted, match=WEIGHTS):
            lance_edge.load(out / folder, "cpu", public_key=key[1])


def test_a_bundle_can_be_signed_where_it_lies(bundle: Path, key: tuple[Path, Path]) -> None:
    assert pack(bundle, bundle, "--without-weights", "--sign", key[0]).exit_code == 0
    lance_edge.load(bundle, "cpu", public_key=key[1]).close()


def test_what_is_packed_must_be_signed_if_a_key_is_set(
    tiny_bundle: Path, tmp_path: Path, key: tuple[Path, Path]
) -> None:
    done = pack(tiny_bundle, tmp_path / "packed", "--public-key", key[1])
    assert done.exit_code == 3
    assert f"{tiny_bundle} is not signed" in done.stderr
    assert not (tmp_path / "packed").exists()


def test_a_key_that_cannot_sign_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, key: tuple[Path, Path]
) -> None:
    done = pack(tiny_bundle, tmp_path / "packed", "--sign", key[0].with_name("no.pem"))
    assert done.exit_code == 2
    assert "no.pem cannot be read" in done.stderr
    assert not (tmp_path / "packed").exists() and not left(tmp_path / "packed")
