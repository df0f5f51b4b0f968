"""Writes the tables of docs/quality.md and docs/performance.md from benchmarks/results/.

Text between `<!-- NAME -->` and `<!-- end -->` is replaced, so no figure is typed by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import RESULTS

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    """Fill in both pages."""
    for page in ("quality.md", "performance.md"):
        path = DOCS / page
        text = path.read_text(encoding="utf-8")
        for name, table in TABLES.items():
            if f"<!-- {name} -->" not in text:
                continue
            text = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                lambda match, table=table: match[1] + table() + "\n" + match[2],
                text,
                flags=re.DOTALL,
            )
        path.write_text(text, encoding="utf-8")


def overall() -> str:
    """The headline figures of quality.json."""
    values = read("quality")["overall"]
    return table(
        ("figure", "value"), [(name.replace("_", " "), f"{v:.3f}") for name, v in values.items()]
    )


def sets() -> str:
    """How much of each evaluation set is flagged."""
    rows = read("quality")["sets"].items()
    return table(
        ("set", "prompts", "flagged"),
        [(n, row["prompts"], f"{row['flagged']:.1%}") for n, row in rows],
    )


def categories() -> str:
    """Per category."""
    rows = read("quality")["categories"]
    columns = (
        "auprc",
        "f1",
        "recall_at_1_percent_fpr",
        "recall_at_5_percent_fpr",
        "ece",
        "ece_graded",
    )
    return table(
        (
            "category",
            "threshold",
            "positives",
            "AUPRC",
            "F1",
            "recall at 1 % FPR",
            "at 5 %",
            "ECE",
            "ECE graded",
        ),
        [
            (n, row["threshold"], row["positives"], *(f"{row[c]:.3f}" for c in columns))
            for n, row in rows.items()
        ],
    )


def disguises() -> str:
    """Prompts in other letters."""
    values = read("disguises")
    rows = [
        (
            name,
            f"{row['still_flagged']} of {values['flagged_prompts']}",
            f"{row['newly_flagged']} of {values['harmless_prompts']}",
        )
        for name, row in values["disguises"].items()
    ]
    return table(
        ("disguise", "flagged prompts that stay flagged", "harmless ones that become so"), rows
    )


def dilution() -> str:
    """Short hazards in long texts."""
    values = read("dilution")
    rows = [
        (
            f"{length}, {how}",
            f"{row['hazardous_flagged']:.1%}",
            f"{row['harmless_flagged']:.1%}",
            f"{row['tokens'] / values['read_once'][length]['tokens']:.2f}",
        )
        for length in values["read_once"]
        for how, row in (
            ("read once", values["read_once"][length]),
            ("read closely", values["read_closely"][length]),
        )
    ]
    return table(
        ("characters", "flagged with a hazard in it", "flagged without", "tokens read"), rows
    )


def hidden() -> str:
    """Hazards beside stronger ones, on screening."""
    rows = [
        (
            f"to rewrite, and to {action}",
            row["prompts"],
            f"{row['as_a_whole']:.1%}",
            f"{row['by_sentence']:.1%}",
        )
        for action, row in read("hidden")["screened"].items()
    ]
    header = (
        "two records",
        "prompts",
        "at least that is decided, read as a whole",
        "by sentence too",
    )
    return table(header, rows)


def hidden_repaired() -> str:
    """Two hazards among harmless prompts, repaired."""
    rows = []
    for count, row in read("hidden")["repaired"].items():
        kept = row["harmless_words_kept"]
        rows.append(
            (
                count,
                row["prompts"],
                f"{row['accepted']:.1%}",
                f"{row['accepted_with_a_sentence_flagged_alone']:.1%}",
                "" if kept is None else f"{kept:.1%}",
            )
        )
    header = (
        "harmless prompts around two hazards",
        "prompts",
        "repaired",
        "repaired, with a sentence that is flagged alone",
        "harmless words kept in order",
    )
    return table(header, rows)


def ablation() -> str:
    """Variational against plain."""
    rows = [
        (
            setting,
            name,
            f"{m['variational']:.4f}",
            f"{m['plain']:.4f}",
            f"{m['gain']:+.4f} [{m['interval_95'][0]:+.4f}, {m['interval_95'][1]:+.4f}]",
        )
        for setting, values in read("ablation")["settings"].items()
        for name, m in values["measures"].items()
    ]
    return table(("supervision", "measure", "variational", "plain", "gain, 95 % interval"), rows)


def ablation_errors() -> str:
    """Errors of single severities, before calibration."""
    rows = [
        (
            setting,
            *(f"{values[key][head]:.4f}" for key in KEYS for head in ("variational", "plain")),
        )
        for setting, values in read("ablation")["settings"].items()
    ]
    header = ("supervision", "ECE variational", "ECE plain", "severity error variational", "plain")
    return table(header, rows)


KEYS = ("macro_ece", "severity_mean_absolute_error")


def int8() -> str:
    """What int8 costs."""
    r = read("int8")
    return table(
        ("figure", "value"),
        [
            ("decisions that differ, all development prompts", f"{r['flipped_decisions']:.2%}"),
            ("of these, prompts files", f"{r['flipped_decisions_prompts']:.2%}"),
            ("of these, refinement pairs (hard)", f"{r['flipped_decisions_pairs']:.2%}"),
            ("mean difference of a severity", f"{r['mean_difference']:.5f}"),
            ("largest difference of a severity", f"{r['largest_difference']:.3f}"),
            ("macro AUPRC fp32", f"{r['macro_auprc']['fp32']:.4f}"),
            ("macro AUPRC int8", f"{r['macro_auprc']['int8']:.4f}"),
            ("graph, MB, fp32", f"{r['bytes']['fp32'] / 1e6:.1f}"),
            ("graph, MB, int8", f"{r['bytes']['int8'] / 1e6:.1f}"),
        ],
    )


def invariance() -> str:
    """Alone, in batches, from threads."""
    rows = [
        (
            p,
            r["prompts"],
            f"{r['largest_difference_batched']:.1e}",
            f"{r['largest_difference_64_threads']:.1e}",
        )
        for p in ("fp32", "int8")
        for r in [read(f"invariance_{p}")]
    ]
    return table(("precision", "prompts", "largest change in a batch", "from 64 threads"), rows)


def refinement() -> str:
    """What became of the held-out refinement records."""
    r = read("refinement")
    rewrite, keep, mixed = r["rewrite"], r["keep"], r["mixed"]
    similar, decoding = r["similarity"], r["decoding"]
    rows = [
        ("records to rewrite", rewrite["records"]),
        ("of these, flagged", f"{rewrite['flagged']:.1%}"),
        ("of these, sent to review by their category", f"{rewrite['sent_to_review']:.1%}"),
        ("of these, accepted within two steps", f"{rewrite['accepted_within_two_steps']:.1%}"),
        ("of these, accepted", f"{rewrite['accepted']:.1%}"),
        (
            "accepted, of those that were flagged for a rewrite",
            f"{rewrite['accepted_of_flagged_rewrites']:.1%}",
        ),
        ("accepted, with passages alone rewritten", f"{decoding['in_passages']:.1%} of these"),
        *(
            (f"accepted, with a log-probability of at least {least}", f"{share:.1%}")
            for least, share in rewrite["accepted_by_least_log_probability"].items()
        ),
        ("refusal phrases in accepted rewrites", rewrite["refusal_phrases"]),
        (f"records to keep ({keep['records']}), byte-identical", f"{keep['identical']:.1%}"),
        (
            f"mixed records ({mixed['records']} accepted): words outside the hazard kept in order",
            f"{mixed['kept']:.1%}",
        ),
        ("the same in the references", f"{mixed['kept_by_the_reference']:.1%}"),
        *(
            (f"{measure} to the reference, {name}", f"{values[key]:.{digits}f}")
            for measure, key, digits in (("chrF", "chrf", 1), ("cosine", "cosine", 3))
            for name, values in similar.items()
        ),
        ("tokens per graph run", f"{decoding['tokens_per_step']:.2f}"),
        ("drafted tokens that were accepted", f"{decoding['accepted_of_drafted']:.1%}"),
    ]
    return table(("figure", "value"), rows)


def reasons() -> str:
    """Why records were not rewritten."""
    rows = sorted(read("refinement")["rewrite"]["reasons"].items(), key=lambda item: -item[1])
    return table(("reason", "records"), rows)


def cascade() -> str:
    """First look, second look, cascade."""
    looks = read("cascade")["looks"]
    figures = [name for name in looks["first"] if name != "sets"]
    rows: list[tuple[Any, ...]] = [
        (figure.replace("_", " "), *(f"{values[figure]:.3f}" for values in looks.values()))
        for figure in figures
    ]
    rows += [
        (
            f"flagged, {name}",
            *(f"{values['sets'][name]['flagged']:.1%}" for values in looks.values()),
        )
        for name in looks["first"]["sets"]
    ]
    return table(("figure", *looks), rows)


def read_twice() -> str:
    """How much of each set gets the second look."""
    rows = [(name, f"{share:.1%}") for name, share in read("cascade")["read_twice"].items()]
    return table(("set", "read twice"), rows)


def cascade_cost() -> str:
    """What a verdict costs with second looks."""
    cost = read("cascade")["cost_ms"]
    header = ("plain prompts", "read twice", "mean ms", "median ms", "p99 ms")
    figures = (f"{cost[key]:.1f}" for key in ("mean", "median", "p99"))
    return table(header, [(cost["prompts"], f"{cost['read_twice']:.1%}", *figures)])


def rewrite_latency() -> str:
    """One rewrite, against the peers."""
    rows = [
        (
            f"{name}: {values['tasks']} rewrites, {values['tokens_mean']:.0f} tokens, "
            f"{values['tokens_per_step']:.1f} a run",
            contestant,
            f"{row['p50_ms']:.0f}",
            f"{row['p99_ms']:.0f}",
            f"{row['ratio_to_ours']:.2f}",
        )
        for name, values in read("rewrite")["sets"].items()
        for contestant, row in values["contestants"].items()
    ]
    return table(("set", "", "p50 ms", "p99 ms", "times ours"), rows)


def step_times() -> str:
    """One graph run by its rows."""
    values = read("rewrite")["step_ms"]
    return table(("rows", *values), [("ms", *(f"{v:.1f}" for v in values.values()))])


def latency() -> str:
    """One prompt, against the peers."""
    rows = [
        (
            tokens,
            name,
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['ratio_to_ours']:.2f}",
        )
        for tokens, peers in read("latency")["tokens"].items()
        for name, row in peers.items()
    ]
    return table(("tokens", "", "p50 ms", "p99 ms", "times ours"), rows)


def cold_start() -> str:
    """Whole processes."""
    rows = [
        (name, f"{row['wall_ms']:.0f}", f"{row['worst_ms']:.0f}", f"{row['peak_mib']:.0f}")
        for name, row in read("cold_start")["processes"].items()
    ]
    return table(("process", "median ms", "worst ms", "peak MiB"), rows)


def machine() -> str:
    """Where the figures come from."""
    e = read("latency")["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    cpu = e["cpu"]
    name = f"{cpu['cores']} cores of {cpu['model']} ({', '.join(cpu['instructions'])})"
    return f"{name}, Python {e['python']}; {versions}."


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def read(name: str) -> dict[str, Any]:
    """A result file."""
    values: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return values


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        overall,
        sets,
        categories,
        disguises,
        dilution,
        hidden,
        hidden_repaired,
        ablation,
        ablation_errors,
        int8,
        refinement,
        reasons,
        cascade,
        read_twice,
        cascade_cost,
        rewrite_latency,
        step_times,
        invariance,
        latency,
        cold_start,
        machine,
    )
}

if __name__ == "__main__":
    main()
