"""Tables and plots of what the benchmarks measured.

python -m bench.render bench/results/FOLDER …     a summary of each into README.md; every case, and a plot, into it
python -m bench.render                            of a GPU, from the newest gpu.json in bench/results, into README.md,
                                                  and a plot beside it
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from bench import gpu_attention, gpu_head, gpu_step

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"
HEAD = ("contestant", "ms", "range", "rounds", "GFLOP/s", "× floor", "peak MiB", "error")
LEGEND = (
    "range: slowest less fastest round, of the median; × floor: times the floor's; peak: growth of resident memory "
    "above the inputs, in a fresh process; error: the worst relative RMS error of a result against float64."
)
RIVALS = ("trl", "liger-kernel", "cut-cross-entropy")
SMALL_MEMORY = 32 * 2**20  # of which what libraries touch for the first time is a good part
ROOFLINE = "roofline.svg"
QUESTIONS = ("attention", "head", "step", "scaling", "loops", "trainers", "rollout")
AXES = {"K": "rationales of a prompt", "P": "tokens of the prompt", "V": "vocabulary"}


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.render")
    parser.add_argument("results", type=Path, nargs="*", help="folders that `pytest bench/ --save` wrote")
    folders = parser.parse_args().results
    if not folders:
        newest = max(RESULTS.glob("*/gpu.json"), default=None)
        found = json.loads(newest.read_text()) if newest else None
        into_readme("gpu", gpu_summary(newest, found))
        if found:
            plot_roofline(found, newest.with_name(ROOFLINE))
        return
    into_readme("bench", "\n\n".join(map(render, folders)))


def render(folder):
    """Every case and plots into the folder. Returns its summary."""
    files = [folder / f"{question}.json" for question in QUESTIONS]
    runs = [json.loads(file.read_text()) for file in files if file.exists()]
    if not runs:
        raise SystemExit(f"{folder} must hold a file of {', '.join(QUESTIONS)}")
    (folder / "cases.md").write_text("\n\n".join(map(every_case, runs)) + "\n")
    scaled = [record for run in runs for record in run["cases"] if record["axes"]]
    if scaled:
        plot(scaled, folder / "scaling.svg")
    return summary(runs, folder.name)


def into_readme(name, text):
    """Between its two lines."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = README.read_text().partition(begin)
    if not rest:
        raise SystemExit(f"README.md must hold the lines {begin} and {end}")
    README.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def gpu_summary(path, found=None):
    """Of every case of bench.gpu, measured or not; found: what stands in `path`, if anything does."""
    found = found or {"cases": [], "whole_model": {"seconds": {}}}
    rows = ["| case | ours | against the fastest other | against its floor |", "|---|---|---|---|"]
    records = {record["case"]: record for record in found["cases"]}
    for module in (gpu_attention, gpu_head, gpu_step):
        for name, _ in module.cases(torch.device("cuda"), toy=False):
            question = module.__name__.removeprefix("bench.gpu_")
            goals = gpu_head.goals(name)
            for ours in ("ours", *gpu_head.GPU_OURS) if goals else ("ours",):
                figures = _gpu_figures(records.get(name), ours, goals.get(ours))
                rows.append(f"| {question}, {name}{ours.removeprefix('ours')} | {' | '.join(figures)} |")
    for name, seconds in found["whole_model"]["seconds"].items():
        others = [f"{other} {taken / seconds['ours']:.2f}×" for other, taken in seconds.items() if other != "ours"]
        rows.append(f"| whole model, {name} | {seconds['ours'] * 1e3:.0f} ms | {', '.join(others)} | |")
    if not path:
        return "\n".join(rows)
    gpu = found["hardware"]["gpus"][0]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "triton"))
    results = path.parent.relative_to(README.parent)
    lines = [f"{gpu['model']}; {versions}; `{found['command']}`, [every contestant]({results}/{path.name}).", "", *rows]
    return "\n".join([*lines, "", f"![useful TFLOP/s of every case]({results}/{ROOFLINE})"])


def _gpu_figures(record, ours, goal):
    """goal: times the floor's time."""
    allowed = f"goal {goal:.2f}×" if goal else ""
    if record is None or ours not in record["contestants"]:
        return ["not yet measured", "", allowed]
    rows = record["contestants"]
    row = rows[ours]
    if "fault" in row:
        return [row["fault"], "", allowed]
    others = {
        name: other["seconds"]
        for name, other in rows.items()
        if "seconds" in other and name != record["floor"] and not name.startswith("ours")
    }
    fastest = min(others, key=others.__getitem__, default=None)
    against_floor = f"{row['seconds'] / record['floor_seconds']:.2f}× the time of {record['floor']}"
    return [
        f"{row['seconds'] * 1e3:.2f} ms, {record['gflop'] / row['seconds'] / 1e3:.0f} TFLOP/s",
        f"{others[fastest] / row['seconds']:.2f}× {fastest}" if fastest else "",
        ", ".join(filter(None, [against_floor, allowed])),
    ]


def plot_roofline(found, path):
    """Useful TFLOP/s of each contestant against the useful operations of the case, under the measured GEMM rate."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found["gemm_tflops"]), figsize=(15, 5), squeeze=False)
    for panel, (question, roof) in zip(panels[0], found["gemm_tflops"].items(), strict=True):
        points = {}
        for record in found["cases"]:
            for name, row in record["contestants"].items():
                if record["question"] == question and "seconds" in row:
                    point = record["gflop"], record["gflop"] / row["seconds"] / 1e3
                    points.setdefault(name, []).append(point)
        for name, of_name in points.items():
            ours = name.startswith("ours")
            panel.plot(*zip(*of_name, strict=True), "o" if ours else "x", alpha=1 if ours else 0.6, label=name)
        panel.axhline(roof, color="black", linewidth=1, label="bfloat16 product of 8192 x 8192")
        panel.set(xscale="log", yscale="log", xlabel="useful GFLOP of a case", ylabel="useful TFLOP/s", title=question)
        panel.legend(fontsize="xx-small", loc="lower left", bbox_to_anchor=(1, 0))
    figure.tight_layout()
    figure.savefig(path)


def text_table(records):
    """case × contestant: time, spread, useful GFLOP/s, ratio to the floor, memory, error."""
    lines, question = [], None
    for record in records:
        if record["question"] != question:
            question = record["question"]
            lines += ["", f"{question}; floor: {record['floor']}", _line(*HEAD)]
        lines.append(f"  {record['case']}")
        for name, row in record["contestants"].items():
            lines.append(_line(name, row["fault"]) if "fault" in row else _line(name, *_figures(record, row)))
    ours = [
        f"{what}: ours is {times} as fast as {other} ({count})" for what, other, count, times, _ in comparisons(records)
    ]
    return "\n".join([*lines, "", LEGEND, "", *ours, *marginal_cost(records)])


def _figures(record, row):
    return (
        f"{row['seconds'] * 1e3:.1f}",
        "" if row["spread"] is None else f"{row['spread']:.0%}",
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


def comparisons(records):
    """(what, other, cases, how often ours fits into its time, and into its memory): geometric means, and the range."""
    groups: dict[str, list] = {}
    for record in records:
        emulated = ", emulated" if record["emulated"] else ""
        groups.setdefault(f"{record['question']}, {record['dtype']}{emulated}", []).append(record)
    for what, of_group in groups.items():
        for other in dict.fromkeys(name for record in of_group for name in [*record["contestants"], record["floor"]]):
            pairs = [pair for record in of_group if (pair := _times_and_memory(record, other))]
            if other != "ours" and pairs:
                times, memory = zip(*pairs, strict=True)
                yield what, other, len(pairs), _range(times), _range([ratio for ratio in memory if ratio])


def summary(runs, folder):
    """Of every case, for the README."""
    lines = [
        _machine(runs[0]),
        "",
        "| measured | ours against | cases | is faster by | needs less memory by |",
        "|---|---|---|---|---|",
    ]
    records = [record for run in runs for record in run["cases"]]
    lines += [f"| {' | '.join(map(str, row))} |" for row in comparisons(records)]
    costs = [f"{line[0].upper()}{line[1:]}." for line in marginal_cost(records)]
    results = f"bench/results/{folder}"
    link = f"[Every case, its sizes and its command]({results}/cases.md)"
    if not costs:
        return "\n".join([*lines, "", f"{link}."])
    plotted = f"![seconds and memory of a step]({results}/scaling.svg)"
    return "\n".join([*lines, "", *costs, "", f"{link}; how a step grows:", "", plotted])


def _times_and_memory(record, other):
    rows = record["contestants"]
    ours = rows["ours"]
    if other == record["floor"] and other not in rows:
        return record["floor_seconds"] / ours["seconds"], None
    if "seconds" not in rows.get(other, {}):
        return None
    sizes = rows[other]["peak_bytes"], ours["peak_bytes"]
    return rows[other]["seconds"] / ours["seconds"], sizes[0] / sizes[1] if min(sizes) > SMALL_MEMORY else None


def _range(ratios):
    if not ratios:
        return ""
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}×{spread}"


def _machine(run):
    cpu, versions = run["hardware"]["cpu"], run["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", *RIVALS) if versions[name])
    return (
        f"CPU only: {cpu['model']}, {cpu['torch_threads']} threads, {' '.join(cpu['instruction_sets'])}, torch's best "
        f"float32 product at {run['gemm_gflops']:.0f} GFLOP/s; {packages}. {' '.join(run['remarks'])}".strip()
    )


def every_case(run):
    """A row for each case and contestant."""
    records = run["cases"]
    lines = [f"## {records[0]['question']}", "", _machine(run), ""]
    lines += [f"`{run['command']}` at {run['commit']}. Floor: {records[0]['floor']}. {LEGEND}", ""]
    lines += [f"| case | {' | '.join(HEAD)} |", "|---" * (1 + len(HEAD)) + "|"]
    for record in records:
        for name, row in record["contestants"].items():
            cells = [row["fault"]] if "fault" in row else map(str, _figures(record, row))
            lines.append(f"| {record['case']} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
