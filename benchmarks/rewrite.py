"""Latency of one rewrite, against the same weights elsewhere: `python benchmarks/rewrite.py --help`.

Prompt and critique in, rewrite out; greedy. The sets: held-out records that the refiner rewrites with
at least 80 % of the tokens copied, 30 to 60 tokens long, and records that it rewrites with at most
20 % copied (longest common subsequence with the prompt). A peer writes as many tokens as ours did,
whichever it chooses. Contestants run in turn on each prompt, with a pause before each: idle thread
pools spin for a while after a run.

ours          lance_edge's refiner, copy-speculative, row-wise int8
plain         the same without drafts
transformers  `generate`, fp32
optimum       ORTModelForCausalLM `generate`, fp32
ctranslate2   Generator, int8
genai         onnxruntime-genai, 4-bit weights (less to read than ours), one token a step
genai_ngram   the same with its n-gram speculation, chained and adaptive

genai's builder needs transformers 5, optimum needs 4: run this once with --work and the other peers,
build in an environment of its own, run it again with all of them:
python -m onnxruntime_genai.models.builder -i WORK/merged -o WORK/genai -p int4 -e cpu
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from environment import environment, save

import lance_edge
from lance_edge.acceptance import common_length
from lance_edge.refiner import Refiner
from lance_edge_training.data import read_rows
from lance_edge_training.lowrank import low_rank_layers
from lance_edge_training.refiner import load_refiner

LENGTHS = range(30, 61)  # tokens of a rewrite in the copied set
PAUSE_S = 0.15

Write = Callable[[list[int], int], None]  # (prefix, prompt and critique as ids; tokens to write)


@dataclass(frozen=True)
class Task:
    """One rewrite: what is read and how many tokens are written, the ending one included."""

    prompt: str
    critique: str
    tokens: int
    copied: float


def _generating(model: Any) -> Write:
    def write(ids: list[int], count: int) -> None:
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=2,
            )

    return write


def transformers_peer(folder: Path, threads: int) -> Write:
    """transformers, fp32, eager."""
    from transformers import AutoModelForCausalLM

    return _generating(AutoModelForCausalLM.from_pretrained(folder).eval())


def optimum_peer(folder: Path, threads: int) -> Write:
    """optimum-onnx, exported here, fp32."""
    from optimum.onnxruntime import ORTModelForCausalLM

    return _generating(ORTModelForCausalLM.from_pretrained(folder, export=True))


def ctranslate2_peer(folder: Path, threads: int) -> Write:
    """CTranslate2, converted here, int8."""
    import ctranslate2

    out = folder.with_name("ctranslate2")
    command = [str(Path(sys.executable).with_name("ct2-transformers-converter"))]
    subprocess.run(
        [*command, "--model", str(folder), "--output_dir", str(out), "--quantization", "int8"],
        check=True,
        capture_output=True,
    )
    generator = ctranslate2.Generator(str(out), device="cpu", intra_threads=threads)
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    by_id = {index: token for token, index in tokens.items()}

    def write(ids: list[int], count: int) -> None:
        generator.generate_batch(
            [[by_id[index] for index in ids]],
            min_length=count,
            max_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )

    return write


def genai_peer(folder: Path, threads: int, **speculative: Any) -> Write:
    """onnxruntime-genai, built beforehand."""
    import onnxruntime_genai

    built = folder.with_name("genai")
    if not built.is_dir():
        raise typer.BadParameter(f"there is no {built}; the docstring says how to build it")
    config = onnxruntime_genai.Config(str(built))
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}})
    )
    model = onnxruntime_genai.Model(config)

    def write(ids: list[int], count: int) -> None:
        length = len(ids) + count
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(min_length=length, max_length=length, do_sample=False)
        if speculative:
            settings.set_speculative_options(**speculative)
        generator = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.token_count() == length

    return write


def genai_ngram_peer(folder: Path, threads: int) -> Write:
    """onnxruntime-genai with the n-gram settings that its documentation recommends."""
    return genai_peer(
        folder,
        threads,
        ngram_size=4,
        max_draft_tokens=8,
        ngram_chained_lookup=True,
        min_adaptive_k=2,
        cooldown=False,
    )


PEERS: dict[str, Callable[[Path, int], Write]] = {
    "transformers": transformers_peer,
    "optimum": optimum_peer,
    "ctranslate2": ctranslate2_peer,
    "genai": genai_peer,
    "genai_ngram": genai_ngram_peer,
}
PACKAGES = {
    "transformers": "transformers",
    "optimum": "optimum-onnx",
    "ctranslate2": "ctranslate2",
    "genai": "onnxruntime-genai",
    "genai_ngram": "onnxruntime-genai",
}


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of the bundle's refiner.")],
    base: Annotated[Path, typer.Option(help="GGUF file of the base model.")],
    data: Annotated[Path, typer.Option(help="Folder with pairs/.")],
    bundle: Annotated[Path | None, typer.Option()] = None,
    peers: Annotated[
        str, typer.Option(help="Which of them, with commas.")
    ] = "transformers,optimum,ctranslate2",
    work: Annotated[
        Path | None,
        typer.Option(help="Keeps the merged checkpoint.", show_default="a temporary folder"),
    ] = None,
    tasks: Annotated[int, typer.Option(min=3, help="Rewrites in each set.")] = 20,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Measure and write benchmarks/results/rewrite.json."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        merged = (work or Path(folder)) / "merged"
        made_of = f"{digest(checkpoint / 'delta.safetensors')} {digest(base)}"
        stamp = merged.with_name("merged.txt")
        if not stamp.is_file():
            merge(checkpoint, base, merged)
            stamp.write_text(made_of, encoding="utf-8")
        elif stamp.read_text(encoding="utf-8") != made_of:
            raise typer.BadParameter(f"{work} holds another checkpoint or base; choose another")
        opened = {name: PEERS[name](merged, threads) for name in peers.split(",")}
        with lance_edge.load(bundle, "cpu", threads=threads) as guard:
            found = find_tasks(guard, data, tasks)
            result = {
                "benchmark": "rewrite",
                "bundle": guard.bundle.sha256,
                "threads": threads,
                "sets": {
                    name: measure(guard.refiner, chosen, opened, repeats)
                    for name, chosen in found.items()
                },
                "step_ms": step_times(guard.refiner),
                "environment": environment(
                    "onnxruntime", "torch", *(PACKAGES[name] for name in opened)
                ),
            }
    save("rewrite", result)


def find_tasks(guard: lance_edge.Pipeline, data: Path, count: int) -> dict[str, list[Task]]:
    """Rewrites of held-out records, by how much the refiner copies: the first that fit."""
    rows = [r for r in read_rows(data / "pairs" / "test.jsonl") if r["action"] == "rewrite"]
    return {
        "copied": first_tasks(
            guard.refiner,
            [row for row in rows if row["kind"] == "mixed"],
            count,
            lambda task: task.tokens in LENGTHS and task.copied >= 0.8,
        ),
        "not_copied": first_tasks(
            guard.refiner,
            [row for row in rows if row["kind"] == "harmful"],
            count,
            lambda task: task.tokens >= 8 and task.copied <= 0.2,
        ),
    }


def first_tasks(
    refiner: Refiner, rows: list[dict[str, Any]], count: int, wanted: Callable[[Task], bool]
) -> list[Task]:
    """The first tasks of the records that are wanted."""
    found: list[Task] = []
    for row in rows:
        if len(found) == count:
            break
        critique = "\n".join(row["gradient"].values())
        made = refiner.rewrite(refiner.read(row["prompt"]), critique)
        kept = common_length(made.ids, refiner.tokenizer.encode(row["prompt"]))
        task = Task(row["prompt"], critique, len(made.ids) + 1, kept / max(1, len(made.ids)))
        if wanted(task):
            found.append(task)
    return found


def measure(
    refiner: Refiner, tasks: list[Task], peers: dict[str, Write], repeats: int
) -> dict[str, Any]:
    """Milliseconds of each contestant on each task, as medians over the tasks, and ratios."""
    times: dict[str, list[float]] = {}
    runs = 0
    for task in tasks:
        made, contestants = contestants_of(refiner, task, peers)
        runs += made
        for name, run in contestants.items():
            run()
            taken = []
            for _ in range(repeats):
                time.sleep(PAUSE_S)
                started = time.perf_counter()
                run()
                taken.append((time.perf_counter() - started) * 1000)
            times.setdefault(name, []).append(float(np.median(taken)))
    ours = np.array(times["ours"])
    return {
        "tasks": len(tasks),
        "tokens_mean": float(np.mean([task.tokens for task in tasks])),
        "copied_share": float(np.mean([task.copied for task in tasks])),
        "tokens_per_step": sum(task.tokens for task in tasks) / runs,
        "contestants": {
            name: {
                "p50_ms": float(np.median(values)),
                "p99_ms": float(np.percentile(values, 99)),
                "ratio_to_ours": float(np.median(np.array(values) / ours)),
            }
            for name, values in times.items()
        },
    }


def contestants_of(
    refiner: Refiner, task: Task, peers: dict[str, Write]
) -> tuple[int, dict[str, Callable[[], object]]]:
    """Graph runs that our rewrite takes, and each contestant as a function without arguments."""
    tokenizer = refiner.tokenizer
    ids = tokenizer.before_critique(tokenizer.encode(task.prompt))
    ids += tokenizer.after_prompt(task.critique)

    def ours(speculative: bool) -> Callable[[], object]:
        return lambda: refiner.rewrite(refiner.read(task.prompt), task.critique, speculative)

    def theirs(write: Write) -> Callable[[], object]:
        return lambda: write(ids, task.tokens)

    made = refiner.rewrite(refiner.read(task.prompt), task.critique)
    return made.steps, {
        "ours": ours(True),
        "plain": ours(False),
        **{name: theirs(write) for name, write in peers.items()},
    }


def step_times(refiner: Refiner, runs: int = 30) -> dict[str, float]:
    """Median milliseconds of one graph run by its number of rows, after 64 tokens."""
    tokens = list(range(1000, 1000 + 64))
    cache = refiner.decoder.start(256)
    refiner.decoder.step(cache, tokens, first=63)
    length = cache.length
    medians = {}
    for rows in (1, 2, 3, 5, 9, 17, 33):
        taken = []
        for _ in range(runs):
            cache.rollback(length)
            started = time.perf_counter()
            refiner.decoder.step(cache, tokens[:rows])
            taken.append((time.perf_counter() - started) * 1000)
        medians[str(rows)] = float(np.median(taken))
    return medians


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def merge(checkpoint: Path, base: Path, folder: Path) -> None:
    """The trained weights as one Hugging Face checkpoint."""
    refiner, _ = load_refiner(checkpoint, base)
    network: Any = refiner.network
    for name, layer in low_rank_layers(network).items():
        layer.linear.weight.data += layer.b.data @ layer.a.data
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.linear)
    network.save_pretrained(folder)
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
