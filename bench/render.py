"""Tables and plots of what the benchmarks measured.

python -m bench.render bench/results/FILE.json       puts a table into README.md, and plots beside the file
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
AXES = {"K": "rationales of a prompt", "P": "tokens of the prompt", "V": "vocabulary"}


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.render")
    parser.add_argument("results", type=Path, help="a file that `pytest bench/ --save` wrote")
    path = parser.parse_args().results
    found = json.loads(path.read_text())
    before, _, rest = README.read_text().partition(BEGIN)
    if not rest:
        raise SystemExit(f"README.md must hold the lines {BEGIN} and {END}")
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{markdown_table(found)}\n{END}{after}")
    plot(found["cases"], path.with_suffix(".svg"))


def text_table(records):
    """case × contestant: time, spread, useful GFLOP/s, ratio to the floor, memory, error."""
    lines, question = [], None
    head = ("contestant", "ms", "±", "rounds", "GFLOP/s", "× floor", "peak MiB", "error")
    for record in records:
        if record["question"] != question:
            question = record["question"]
            lines += ["", f"{question}; floor: {record['floor']}", _line(*head)]
        lines.append(f"  {record['case']}")
        for name, row in record["contestants"].items():
            lines.append(_line(name, row["fault"]) if "fault" in row else _line(name, *_figures(record, row)))
    closing = [f"{question}: {text}" for question, text in verdicts(records).items()] + marginal_cost(records)
    return "\n".join([*lines, "", *closing])


def _figures(record, row):
    return (
        f"{row['seconds'] * 1e3:.1f}",
        f"{row['spread']:.0%}",
        row["rounds"],
        f"{record['gflop'] / row['seconds']:.1f}",
        f"{row['seconds'] / record['floor_seconds']:.2f}",
        f"{row['peak_bytes'] / 2**20:.0f}",
        "" if row["error"] is None else f"{row['error']:.1e}",
    )


def _line(name, *figures):
    if len(figures) == 1:
        return f"    {name:<36}{figures[0]}"
    return f"    {name:<36}" + "".join(f"{figure:>10}" for figure in figures)


def verdicts(records):
    """For each question, the geometric mean of how much faster ours is than the best other that computes the same."""
    ratios: dict[str, list[float]] = {}
    for record in records:
        ours, other = ours_and_best_other(record)
        if other:
            ratio = record["contestants"][other]["seconds"] / record["contestants"][ours]["seconds"]
            ratios.setdefault(f"{record['question']} {record['dtype']}", []).append(ratio)
    return {
        question: f"ours is {_mean(found):.2f}× as fast as the best other (geometric mean of {len(found)} cases, "
        f"{min(found):.2f} to {max(found):.2f})"
        for question, found in ratios.items()
    }


def _mean(ratios):
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def ours_and_best_other(record):
    rows = record["contestants"]
    ours, *others = rows
    others = [
        name for name in others if "seconds" in rows[name] and name != record["floor"] and not name.startswith(ours)
    ]
    return ours, min(others, key=lambda name: rows[name]["seconds"], default=None)


def markdown_table(found):
    cpu = found["hardware"]["cpu"]
    lines = [
        f"{cpu['model']}, {cpu['torch_threads']} threads, {' '.join(cpu['instruction_sets'])}; torch "
        f"{found['versions']['torch']}; GEMM rate {found['gemm_gflops']:.0f} GFLOP/s; commit {found['commit'][:12]}; "
        f"`{found['command']}`.",
        "",
        "| case | ours, ms | × floor | best other | ms | ours is faster by | peak MiB, both | error, both |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(record) for record in found["cases"]]
    closing = [f"{name}: {text}" for name, text in verdicts(found["cases"]).items()] + marginal_cost(found["cases"])
    return "\n".join([*lines, "", *(f"- {line}." for line in closing)])


def _markdown_row(record):
    rows = record["contestants"]
    ours, other = ours_and_best_other(record)
    mine, theirs = rows[ours], rows.get(other, {})

    def both(key, show):
        return " / ".join(show(row[key]) if row.get(key) is not None else "" for row in (mine, theirs))

    ratio = f"{theirs['seconds'] / mine['seconds']:.2f}×" if theirs else ""
    other_ms = f"{theirs['seconds'] * 1e3:.1f}" if theirs else ""
    cells = [
        f"{record['question']}: {record['case']}",
        f"{mine['seconds'] * 1e3:.1f}",
        f"{mine['seconds'] / record['floor_seconds']:.2f}",
        other or "",
        other_ms,
        ratio,
        both("peak_bytes", lambda value: f"{value / 2**20:.0f}"),
        both("error", lambda value: f"{value:.0e}"),
    ]
    return f"| {' | '.join(cells)} |"


def along(axis, records):
    """The cases that differ from the first one in nothing but this axis, in its order."""
    scaled = [record for record in records if record["axes"]]
    others = [name for name in AXES if name != axis]
    found = [record for record in scaled if all(record["axes"][name] == scaled[0]["axes"][name] for name in others)]
    return sorted(found, key=lambda record: record["axes"][axis])


def marginal_cost(records):
    """What one more rationale costs at each length of the prompt, where it was measured with more than one number."""
    lines = []
    for P in sorted({record["axes"]["P"] for record in records if record["axes"]}):
        found = along("K", [record for record in records if record["axes"] and record["axes"]["P"] == P])
        first, last = found[0], found[-1]
        more = last["axes"]["K"] - first["axes"]["K"]
        slopes = [
            f"{name} {(last['contestants'][name]['seconds'] - row['seconds']) / more * 1e3:.0f} ms"
            for name, row in first["contestants"].items()
            if more and "seconds" in row and "seconds" in last["contestants"][name]
        ]
        if slopes:
            lines.append(f"one more rationale at P={P}: {', '.join(slopes)}")
    return lines


def plot(records, path):
    """Seconds and memory against each axis that cases were scaled along, a line for each contestant."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(AXES), figsize=(4 * len(AXES), 6), squeeze=False)
    for column, (axis, label) in enumerate(AXES.items()):
        cases = along(axis, records)
        for panel, key, scale, name in (
            (panels[0][column], "seconds", 1, "seconds of a step"),
            (panels[1][column], "peak_bytes", 2**20, "peak MiB"),
        ):
            for contestant in cases[0]["contestants"]:
                rows = [(record["axes"][axis], record["contestants"][contestant]) for record in cases]
                points = [(value, row[key] / scale) for value, row in rows if key in row]
                panel.plot(*zip(*points, strict=True), marker="o", label=contestant)
            panel.set(xlabel=label, ylim=(0, None), ylabel=name if column == 0 else None)
    panels[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
