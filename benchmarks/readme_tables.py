"""Makes the tables of results in README.md and docs/tuning.md from the result files committed.

    python benchmarks/readme_tables.py           # writes both
    python benchmarks/readme_tables.py --check   # exits with 1 if that would change one

A table is between two comments, the first of which says what it is made of:

    <!-- table: network 200mbit 1gbit balanced -->
    <!-- end -->

`network` has a row for each method, `quality` one for each setting. The words that follow pick from
the JSON files in benchmarks/results: rates and routings pick rows, all others are the first letters
of files or directories there. With the word over-METHOD, speed-ups are over that method in place of
stock Megatron. Without results there is no table. `plan` is made of no results: followed by
break-even or speedup, it is what the planner predicts (plan_tables.py).
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median

from plan_tables import break_even_table, speedup_table

from megatron_moe_comp.report.inputs import Entry, InputError, find_files, read_results
from megatron_moe_comp.report.network_results import (
    STOCK,
    UNSHAPED,
    Case,
    bits_label,
    cases,
    rate_bits,
)
from megatron_moe_comp.report.quality_results import (
    BASELINE,
    by_setting,
    compression_ratio,
    perplexity_ratio,
)
from megatron_moe_comp.report.section import number, spread

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/tuning.md")
ROUTINGS = ("balanced", "real")
OVER = "over-"
MARKED = re.compile(r"(<!-- table: (\w+) ?(.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes or checks the documents; exits with 1 if one is not what the results give."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    documents = [ROOT / name for name in DOCUMENTS]
    parser.add_argument("--readme", type=Path, nargs="+", metavar="FILE", default=documents)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(arguments)
    for document in options.readme:
        before = document.read_text()
        try:
            after = fill(before, options.results)
        except (InputError, ValueError) as error:
            sys.exit(str(error))
        if options.check and after != before:
            sys.exit(
                f"{document}: its tables are not those of {options.results}. Run `python "
                "benchmarks/readme_tables.py`."
            )
        if after != before:
            document.write_text(after)


def fill(text: str, results: Path) -> str:
    """Returns the text with every marked table made anew."""
    makers = {"network": network_table, "quality": quality_table, "plan": plan_table}

    def made(match: re.Match[str]) -> str:
        start, kind, words, _, end = match.groups()
        if kind not in makers:
            raise ValueError(f"table: {kind}: expected {' or '.join(makers)}. Change the comment.")
        return f"{start}{makers[kind](results, words.split())}{end}"

    return MARKED.sub(made, text)


def network_table(results: Path, words: Sequence[str]) -> str:
    """Returns speed-ups and shares of the possible gain, a column for each rate and ranks."""
    rates, routings = [w for w in words if is_rate(w)], [w for w in words if w in ROUTINGS]
    over = [w for w in words if w.startswith(OVER)]
    rows = read(results, [w for w in words if w not in (*rates, *routings, *over)], "network")
    baseline = over[0].removeprefix(OVER) if over else STOCK
    # The limit needs the unshaped rows, whether they are shown or not.
    found = cases(row for row in rows if not routings or row["routing"] in routings)
    columns = [
        (rate, case)
        for rate in sorted({row["rate"] for row in rows}, key=rate_bits)
        for case in found
        if (rate in rates if rates else rate != UNSHAPED) and rate in case.rates
    ]
    if not columns:
        return ""
    several = len({case.routing for _, case in columns}) > 1
    names = [
        f"{bits_label(rate_bits(rate))}, {case.name if several else f'{case.ranks} ranks'}"
        for rate, case in columns
    ]
    body = [["limit", *(number(case.limit(rate, baseline), 2) for rate, case in columns)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        if method in (STOCK, baseline):
            continue
        cells = [
            ratio_cell(case, rate, method, baseline) if over else speedup_cell(case, rate, method)
            for rate, case in columns
        ]
        body.append([f"`{method}`", *cells])
    return markdown(["method", *names], body)


def is_rate(word: str) -> bool:
    """Returns whether a word is a rate of tc, or "none"."""
    try:
        rate_bits(word)
    except ValueError:
        return False
    return True


def speedup_cell(case: Case, rate: str, method: str) -> str:
    """Returns "speed-up (min to max), share of the possible gain"."""
    row = case.by_rate_and_method.get((rate, method), {})
    speedup = spread(row.get("speedup"), row.get("speedup_min"), row.get("speedup_max"), 2)
    share = case.share_of_gain(row) if row else None
    return speedup if share is None else f"{speedup}, {100 * share:.0f}%"


def ratio_cell(case: Case, rate: str, method: str, baseline: str) -> str:
    """Returns "speed-up over the baseline (min to max)", of the steps of each repeat."""
    rows = [case.by_rate_and_method.get((rate, name)) for name in (baseline, method)]
    if None in rows:
        return number(None, 2)
    times = zip(*(row["step_ms_repeats"] for row in rows if row), strict=True)
    ratios = [slow / fast for slow, fast in times]
    return spread(median(ratios), min(ratios), max(ratios), 2)


def plan_table(results: Path, words: Sequence[str]) -> str:
    """Returns what the planner predicts for published models; it needs no results."""
    tables = {"break-even": break_even_table, "speedup": speedup_table}
    chosen = [word for word in words if word in tables]
    if len(chosen) != 1:
        raise ValueError(
            f"table: plan {' '.join(words)}: expected {' or '.join(tables)}. Change the comment."
        )
    return markdown(*tables[chosen[0]]())


def quality_table(results: Path, words: Sequence[str]) -> str:
    """Returns bytes and perplexity of every setting."""
    return table_of_runs(read(results, words, "quality"))


def table_of_runs(entries: Iterable[Entry]) -> str:
    """Returns bytes and perplexity of the settings of runs of benchmarks/quality.py."""
    body = []
    runs = by_setting(entries)
    for name, seeds in runs.items():
        perplexities = [run["validation_perplexity"] for run in seeds.values()]
        ratio = perplexity_ratio(runs, name)
        compared = spread(ratio.mean, ratio.low, ratio.high, 4) if ratio else "-"
        rates = [run["stats"]["lsh"]["rate"] for run in seeds.values() if run["stats"].get("lsh")]
        body.append(
            [
                f"`{name}`",
                number(compression_ratio(seeds), 2, "x"),
                number(mean(rates) if rates else None, 3),
                spread(mean(perplexities), min(perplexities), max(perplexities), 2),
                "1" if name == BASELINE else compared,
                str(len(seeds)),
            ]
        )
    header = ["setting", "ratio of bytes", "centroids per row", "perplexity, mean (min to max)"]
    header += ["ratio to none (95% interval)", "seeds"]
    return markdown(header, body) if body else ""


def read(results: Path, prefixes: Sequence[str], kind: str) -> list[Entry]:
    """Returns the entries of a kind in the files that are picked."""
    if not any(results.rglob("*.json")):
        return []
    files = find_files([results])
    if prefixes:
        files = [f for f in files if str(f.relative_to(results)).startswith(tuple(prefixes))]
    return getattr(read_results(files), kind)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
