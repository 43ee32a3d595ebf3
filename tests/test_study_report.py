"""The study's tables, figures and document, of results that are made up: whole, in part, with what is not finite."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from latro.statistics import holm, paired_difference
from latro.study import command, tables
from latro.study.cases import CASES
from latro.study.comparisons import AGAINST, CLAIMED, claims, compared
from latro.study.document import DocumentError, filled, stale, write
from latro.study.figures import FIGURES
from latro.study.labels import CHARACTER, LINE, place
from latro.study.markdown import NATS, PERCENT, THOUSANDS, probability, unseen, written
from latro.study.options import changes
from latro.study.plan import Cell
from latro.study.plot import Scale, between, linear, logarithmic
from latro.study.records import (
    LABELS,
    Study,
    answers,
    by_method,
    collapsed,
    estimate,
    golden_length,
    in_order,
    kept,
    pairs,
)
from latro.study.tables import TABLES, methods, recipes, slopes
from latro.tasks import named
from latro.watch import SHRUNK
from tests.made_up_study import OUTCOMES, RECIPES, SHORT, STAGES, TASKS, plan, result, study_of


@pytest.fixture(scope="module")
def whole():
    return study_of(plan())


@pytest.fixture(scope="module")
def document():
    return (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")


def rows_of(text):
    """Of all tables in Markdown, by row: the cells, without the marks of bold print."""
    lines = [line for line in plain(text).splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip().replace("**", "") for cell in line.strip("| ").split(" | ")] for line in lines]


def plain(text):
    """Without what keeps words on one line."""
    return text.replace("\u00a0", " ")


def not_numbers(text):
    return re.findall(r"\b(?:nan|inf)\b", text)


def texts_of(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


# Results


def test_a_cell_of_several_experiments_is_one_result(whole):
    own = [one["key"] for one in whole.of("stability", changed={})]
    assert own == [one["key"] for one in whole.of("lengths", changed={})]
    assert len(whole.of("stability", "lengths")) == len(whole.of("stability")) + len(whole.of("lengths")) - len(own)
    assert {one["key"] for one in whole.of("methods", task="cups", method="gain")} <= set(whole.results)
    assert whole.seeds == 3


def test_a_task_is_called_by_its_family_where_that_is_enough():
    both = Study({}, {"methods": [Cell(task, "careful", "base", 0) for task in (*TASKS, "cups(steps=5)")]})
    assert [both.short(task) for task in ("sort", "cups", "cups(steps=5)")] == ["sort", "cups", "cups(steps=5)"]
    assert both.short(TASKS[0]) == "chain"


def test_answers_keep_the_first_questions():
    found = {"metrics": {"n": 10}, "right": {"accuracy": "5"}}
    assert answers(found) == [False] * 7 + [True, False, True]


def test_pairs_are_of_the_same_seed(whole):
    of_base, of_gain = (whole.of("methods", task="cups", method=method) for method in ("base", "gain"))
    assert [(a["seed"], b["seed"]) for a, b in pairs(of_base[1:], of_gain)] == [(1, 1), (2, 2)]


def test_estimate_counts_what_is_not_finite():
    found = estimate([1.0, math.nan, 3.0, -math.inf])
    assert (found.mean, found.n, found.lost) == (2.0, 2, 2)
    assert found.half == pytest.approx(12.706205)
    nothing = estimate([math.nan])
    assert (nothing.n, nothing.lost) == (0, 1)
    assert math.isnan(nothing.mean)


def test_collapse_is_told_by_the_length_of_golden_rationales():
    cell = Cell("cups", "careful", "latro", 0)
    found = result(cell)
    examples = named("cups").problems(0, 256, "test")
    golden = sum(len(example.rationale) for example in examples) / 256
    assert golden_length("cups") == pytest.approx(golden)
    for share, gone in ((0.99 * SHRUNK, True), (1.01 * SHRUNK, False)):
        found["metrics"]["rationale_length"] = share * golden
        assert collapsed(found) is gone
        assert kept(found) == pytest.approx(share)


# Tables


def test_self_explore_is_compared_with_its_own_stages(whole):
    rows = {row[0]: row[1:] for row in rows_of(TABLES["explore"](whole)) if len(row) == 5}
    assert [name for name in rows if name not in ("stage", "---")] == [tables.STAGES[name] for name in STAGES]
    assert rows["RFT"][1].startswith("+14.0 [") and rows["RFT"][3] == "< 0.001"
    assert rows["DPO on first wrong steps"][1].startswith("+13.0 [") and rows["DPO on first wrong steps"][2].startswith(
        "−1.0 ["
    )
    assert rows["base"][1:] == ["—", "—", "—"]


@pytest.mark.parametrize("name", [*TABLES, *CASES])
def test_a_table_has_the_same_cells_in_each_row(whole, name):
    text = {**TABLES, **CASES}[name](whole)
    tables = re.split(r"\n(?!\|)", text)
    of_rows = [{len(row) for row in rows_of(one)} for one in tables if one.lstrip().startswith("|")]
    assert of_rows or name == "failures"
    assert all(len(widths) == 1 for widths in of_rows)
    assert not not_numbers(text)


def test_a_probability_says_on_which_side_of_the_level_it_is():
    shown = [probability(p) for p in (0.0004, 0.0123, 0.0498, 0.0502, 0.4)]
    assert shown == ["< 0.001", "0.012", "0.0498", "0.0502", "0.400"]


def test_written():
    assert written(estimate([0.5, 0.7]), PERCENT, 2) == "60.0 ± 127.1"
    assert written(estimate([0.5]), PERCENT, 1) == "50.0"
    assert written(estimate([-1.234]), NATS, 3) == "−1.23 (1 of 3 seeds)"
    assert written(estimate([math.nan, 0.5]), PERCENT, 2) == "50.0 (1 not finite)"
    assert written(estimate([math.nan]), PERCENT, 2) == "(1 of 2 seeds, 1 not finite)"
    assert written(estimate([]), PERCENT, 2) == "—"
    assert written(estimate([-0.001]), NATS, 1) == "0.00"
    assert written(estimate([1e6, 3e6]), THOUSANDS, 2) == "2,000"


def test_methods_are_means_over_seeds(whole):
    heads, *rows = rows_of(methods(whole))
    assert heads == ["method", *SHORT]
    assert [row[0] for row in rows] == [LABELS[method] for method in in_order(OUTCOMES)]
    (of_gain,) = (row for row in rows if row[0] == "gain")
    values = [one["metrics"]["accuracy"] for one in whole.of("methods", task="sort", method="gain")]
    half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
    assert of_gain[2] == f"{100 * np.mean(values):.1f} ± {100 * half:.1f}"
    (of_options,) = (row for row in rows if row[0] == "log-odds")
    assert of_options[1:4] == ["", "", ""]


def test_claims_are_corrected_for_all_of_their_tests(whole):
    rows = rows_of(claims(whole))[1:]
    assert len(rows) == len(TASKS) * len(RECIPES) * len(CLAIMED)
    by_hand = []
    for one in compared(whole, lambda method: method in CLAIMED):
        of_methods = {
            method: [run["metrics"]["accuracy"] for run in runs]
            for method, runs in by_method(whole.of("recipes", task=one.task, recipe=one.recipe)).items()
        }
        for against, (difference, better) in zip(AGAINST, one.differences, strict=True):
            assert difference == paired_difference(of_methods[against], of_methods[one.method])
            assert better == 3
            by_hand.append(difference.p_value)
    adjusted = holm(by_hand)
    assert [row[column] for row in rows for column in (4, 7)] == [probability(p) for p in adjusted]
    assert max(adjusted) > max(by_hand)


def test_a_difference_is_bold_only_where_it_is_significant():
    def equal(found):
        found["metrics"]["accuracy"], found["right"]["accuracy"] = 0.5, "f" * 16
        if found["method"] == "latro_floor" and found["task"] == "cups":
            found["metrics"]["accuracy"] = 0.75 + found["seed"] / 128

    text = plain(claims(study_of(plan(), change=equal)))
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert all(("**" in line) == (line.startswith("| cups |") and LABELS["latro_floor"] in line) for line in lines)
    assert "| +0.0 (+0.0 to +0.0) | 1.000 | 0 of 3 |" in lines[0]


def test_recipes_say_what_vanished(whole):
    rows = {(row[0], row[1]): row for row in rows_of(recipes(whole))}
    heads = rows["task", "base's recipe"]
    latro, floor = heads.index("LaTRO, λ=1"), heads.index("LaTRO, λ=0, floor")
    sloppy, careful = rows["cups", "sloppy"], rows["cups", "careful"]
    assert "3 of 3 predicted" in sloppy[2] and "predicted" not in careful[2]
    assert "3 of 3 vanished" in sloppy[latro]
    assert "vanished" not in sloppy[floor] + careful[latro] + sloppy[heads.index("SFT, answers")]


def test_gate_counts_runs_by_what_was_predicted(whole):
    of_method = {row[0]: row[1:] for row in rows_of(TABLES["gate"](whole))}
    assert of_method["LaTRO, λ=1"] == ["12 of 12", "0 of 24"]
    assert of_method["gain"] == ["0 of 12", "0 of 24"]


def test_vanishing_says_when_and_what_the_reward_did():
    def logged(found):
        golden = golden_length(found["task"])
        rise = 0.5 if found["seed"] else -0.5
        found["log"] = [
            {"step": step, "rationale_length": length * golden, "reward": reward}
            for step, length, reward in ((8, 0.6, -2.0), (16, 0.3, -2.0), (24, 0.2, -2.0), (32, 0.0, -2.0 + rise))
        ]

    first, second = rows_of(TABLES["vanishing"](study_of(plan(), change=logged)))[1:]
    assert first == ["LaTRO, λ=1", "12", "24", "−2.00 ± 0.00", "−1.83 ± 0.31", "8 of 12"]
    assert second[0] == "LaTRO, λ=0"
    healthy = study_of({"recipes": [Cell(TASKS[0], "careful", "gain", 0)]}, change=logged)
    assert TABLES["vanishing"](healthy) == "No rationales vanished."


def test_slope_is_of_a_line_through_the_sizes():
    def line(found):
        found["metrics"]["accuracy"] = 0.2 + 0.1 * math.log10(float(found["size"][:-1])) + 0.01 * found["seed"]

    study = study_of({"sizes": plan()["sizes"]}, change=line)
    assert slopes(study.of("sizes", task=TASKS[0], method="base")) == pytest.approx([0.1] * 3)
    assert slopes(study.of("sizes", size="1M", task=TASKS[0], method="base")) == []
    assert all(row[-1] == "10.0 ± 0.0" for row in rows_of(TABLES["sizes"](study))[1:])


def test_values_of_an_option_are_in_order_with_the_own_one_among_them(whole):
    ((key, options),) = changes(whole, "stability").items()
    assert key == (TASKS[0], "latro_no_answer")
    assert [value for value, _ in options["beta"]] == ["0", "0.05", "0.3"]
    assert [value for value, _ in options["num_generations"]] == ["2", "8", "16"]
    assert [value for value, _ in options["normalize_advantages"]] == ["none", "group"]
    assert [len(runs) for _, runs in options["beta"]] == [3, 3, 3]
    ((_, capped),) = changes(whole, "lengths").items()
    assert [value for value, _ in capped["cap"]] == ["0.25", "0.5", "1"]


# Of a part of the plan


def test_what_is_missing_is_said():
    def missing(cell):
        return cell.method == "gain" or cell.task == "sort" or (cell.method, cell.seed) == ("rloo", 1)

    study = study_of(plan(), missing)
    rows = {row[0]: row[1:] for row in rows_of(methods(study))}
    assert rows["gain"] == ["—"] * 4
    assert all("(2 of 3 seeds)" in cell for cell in (*rows["RLOO, correctness"][:1], *rows["RLOO, correctness"][2:]))
    assert all(row[1] == "—" for row in rows.values() if row[1] != "sort" and row[1])
    text = unseen(study, "methods")
    assert "\n- cups, careful, 0.15M: gain (seed 0, 1, 2); rloo (seed 1)\n" in text
    assert "\n- sort, careful, 0.15M: base, sft_answers, latro, " in text
    options = unseen(study_of(plan(), lambda cell: bool(cell.changed)), "lengths")
    assert "latro_no_answer cap=0.25, latro_no_answer cap=0.5 (seed 0, 1, 2)" in options
    counted = {row[0]: [int(number) for number in row[1:]] for row in rows_of(TABLES["coverage"](study))[1:]}
    for planned, there, absent in counted.values():
        assert planned == there + absent
    assert counted["methods"][2] > 0
    not_run = texts_of(FIGURES["golden"](study)).count("not run")
    assert not_run == 3


def test_a_run_that_stopped_and_one_of_fewer_steps():
    def stop(found):
        if found["seed"] == 1:
            del found["by_step"][-1]
        if found["method"] == "verifree":
            found["failed"] = "loss must be finite, got nan"
            found["metrics"] |= {"answer_logp": math.nan, "self_reward_auc": None}

    study = study_of(plan(), change=stop)
    assert "(3 stopped)" in plain(methods(study))
    assert "stopped: loss must be finite, got nan" in TABLES["coverage"](study)
    of_verifree = [row for row in rows_of(TABLES["tasks"](study)) if row[0] == "VeriFree"]
    assert all("(3 not finite)" in row[5] and "(3 not finite)" in row[6] for row in of_verifree)
    assert not not_numbers(FIGURES["lengths"](study))


@pytest.mark.parametrize(
    "missing",
    [
        lambda cell: True,
        lambda cell: cell.method == "base",
        lambda cell: cell.method != "base",
        lambda cell: cell.task != "choice",
        lambda cell: cell.seed != 0,
        lambda cell: bool(cell.changed),
        lambda cell: not cell.changed,
    ],
    ids=["all", "bases", "trained", "tasks", "seeds", "changed", "own"],
)
def test_a_part_of_the_study_is_rendered(document, missing):
    study = study_of(plan(seeds=2), missing)
    text = filled(document, study)
    assert not not_numbers(text)
    for draw in FIGURES.values():
        assert not not_numbers(draw(study))


def test_one_seed_has_no_interval(document):
    study = study_of(plan(seeds=1))
    text = filled(document, study)
    assert "±" not in methods(study)
    assert "One seed: there is no interval." in text
    assert "one seed" in plain(claims(study))
    for draw in FIGURES.values():
        assert not not_numbers(draw(study))


def test_what_is_not_finite_is_not_drawn():
    def lose(found):
        if found["method"] in ("gain", "base"):
            found["metrics"] |= {"accuracy": math.nan, "rationale_length": math.nan}
            for look in found["curve"]:
                look["self_reward_auc"] = None
                look["accuracy"] = math.nan

    study = study_of(plan(), change=lose)
    for name, draw in FIGURES.items():
        assert not not_numbers(draw(study))
        if name not in ("stability", "feedback", "calibration", "lengths"):  # they show other runs, or other figures
            assert any("not finite" in text for text in texts_of(draw(study))), name


# Drawing


def test_names_in_a_scatter_plot_are_on_nothing_else():
    rng = random.Random(0)
    for _ in range(2):
        # Most of them close together, as methods that learn a task are.
        dots = [(200 + 40 * rng.random(), 20 + 30 * rng.random()) for _ in range(12)]
        dots += [(400 * rng.random(), 300 * rng.random()) for _ in range(8)]
        texts = ["LaTRO, λ=0, floor" if n % 3 else "DPO" for n in range(20)]
        boxes = place(dots, texts, 415, 300)
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        for box, text in zip(boxes, texts, strict=True):
            assert 0 <= box.left < box.right <= 415
            assert box.right - box.left >= CHARACTER * len(text)
            assert box.bottom - box.top == pytest.approx(LINE)
            assert not any(box.left < x < box.right and box.top < y < box.bottom for x, y in dots)


def test_scales():
    scale = linear([-1.9, -0.2, math.nan], 100, 0)
    assert (scale.at(scale.low), scale.at(scale.high)) == (100, 0)
    assert scale.low <= -1.9 and scale.high >= -0.2
    assert [text for _, text in scale.ticks] == ["−2.0", "−1.5", "−1.0", "−0.5", "0.0"]
    by_factor = logarithmic([10, 1000], 0, 90)
    assert by_factor.at(100) == pytest.approx(45)
    assert [text for _, text in by_factor.ticks] == ["10", "20", "50", "100", "200", "500", "1,000"]
    assert between(0, 100, 25, 80, 0) == Scale(
        0, 100, 80, 0, ((0, "0"), (25, "25"), (50, "50"), (75, "75"), (100, "100"))
    )
    assert between(0, 100, 25, 80, 0).within(130) == 0


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_what_it_shows(whole, name):
    svg = FIGURES[name](whole)
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label")
    assert "prefers-color-scheme: dark" in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    kinds = {kind for node in root.iter() for kind in (node.get("class") or "").split()}
    assert kinds & {"line", "dot", "bar"}
    assert "missing" not in kinds
    wide, high = float(root.get("width")), float(root.get("height"))
    assert wide <= 1100
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        left, top = map(float, re.findall(r"[\d.]+", group.get("transform")))
        assert 0 <= left < wide and 0 <= top < high


def test_a_figure_of_nothing_says_so():
    study = study_of(plan(), missing=lambda cell: True)
    for draw in FIGURES.values():
        assert "nothing of this was run yet" in texts_of(draw(study))


def test_curves_are_means_over_seeds(whole):
    root = ElementTree.fromstring(FIGURES["learning"](whole))
    paths = [node.get("d") for node in root.iter("{http://www.w3.org/2000/svg}path") if "c9 line" in node.get("class")]
    last = [[look["accuracy"] for look in one["curve"]][-1] for one in whole.of("methods", method="sft_golden")][:3]
    # The legend's line, and one in each of eight panels.
    assert len(paths) == 9
    end = float(paths[1].split()[-1])
    assert end == pytest.approx(145 * (1 - np.mean(last)), abs=0.06)


def test_bars_are_mean_distances_to_golden(whole):
    root = ElementTree.fromstring(FIGURES["golden"](whole))
    bars = [node for node in root.iter("{http://www.w3.org/2000/svg}rect") if "bar" in node.get("class")]
    of_base, of_golden = (
        np.mean([one["metrics"]["accuracy"] for one in whole.of("methods", task=TASKS[0], method=method)])
        for method in ("base", "sft_golden")
    )
    assert len(bars) == len(whole.of("methods")) / 3 - len(TASKS)
    # From −100 to 25 points in 170 units.
    assert float(bars[0].get("width")) == pytest.approx(136 * (of_golden - of_base), abs=0.06)
    assert float(bars[0].get("x")) == pytest.approx(136 - 136 * (of_golden - of_base), abs=0.06)


# The document


def test_the_document_holds_every_table_and_figure(document, whole):
    text = filled(document, whole)
    assert claims(whole) in text
    assert filled(text, whole) == text
    assert text.startswith(document.split("<!-- table")[0])


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("table: gate", "table: gates", "tables must be some of .*, got 'gates'"),
        ("<!-- table: gate -->\n<!-- end -->", "", "must have the table gate once, got 0 times"),
        ("table: gate", "table: claims", "must have the table claims once, got 2 times"),
        ("figures/gate.svg", "figures/gates.svg", "figures must be some of .*, got 'gates'"),
        ("(figures/gate.svg)", "(figures/cost.svg)", "must have the figure gate once, got 0 times|cost once, got 2"),
        ("# What", "<!-- end -->\n# What", "times <!-- end -->, got"),
    ],
)
def test_a_document_without_a_place_is_refused(whole, old, new, error):
    text = "\n".join(["# What"] + [f"<!-- table: {name} -->\n<!-- end -->" for name in (*TABLES, *CASES)])
    text += "".join(f"![](figures/{name}.svg)" for name in FIGURES)
    assert old in text
    filled(text, whole)
    with pytest.raises(DocumentError, match=error):
        filled(text.replace(old, new, 1), whole)


def test_write_changes_only_what_is_stale(tmp_path, document):
    whole = study_of(plan(TASKS[:2], seeds=1))
    path = tmp_path / "study.md"
    path.write_text(document, encoding="utf-8")
    written_first = write(path, whole)
    assert {one.name for one in written_first} >= {"study.md", *(f"{name}.svg" for name in FIGURES)} - {
        "study.md" if filled(document, whole) == document else ""
    }
    assert write(path, whole) == stale(path, whole) == []
    figure = tmp_path / "figures" / "cost.svg"
    figure.write_text("another")
    assert stale(path, whole) == [figure]
    path.write_text(path.read_text(encoding="utf-8").replace("| base |", "| basis |", 1), encoding="utf-8")
    assert stale(path, whole) == [path, figure]
    other = study_of(plan(TASKS[:2], seeds=1), missing=lambda cell: cell.method == "star")
    assert path in stale(path, other)


# Cases


def test_cases_are_of_each_task_in_turn(whole):
    rows = rows_of(TABLES_AND_CASES["cases"](whole))[1:]
    assert [row[0] for row in rows] == [*SHORT, *SHORT, *SHORT[:2]]
    assert rows[0][-1].startswith("✓ <code>7&#42;3")


def test_failures_are_shown_and_counted():
    def fail(found):
        if found["method"] == "latro_floor" and found["recipe"] == "sloppy":
            for case in found["cases"][:2]:
                case["greedy"] = case["samples"][1]

    study = study_of(plan(), change=fail)
    text = TABLES_AND_CASES["failures"](study)
    assert text.startswith("8 of 240 such questions")
    rows = rows_of(text)[1:]
    assert len(rows) == 8
    assert {row[1] for row in rows} == {"sloppy"}
    assert all(row[-1].startswith("✗ <code>7&#42;3=2;&#60;i&#62;&#95;&#124;&#35;2</code>") for row in rows)
    assert all(row[-1].endswith("ℓy −3.20, step 1 is wrong") for row in rows)


TABLES_AND_CASES = {**TABLES, **CASES}


def test_the_page_has_what_the_committed_results_give():
    root = Path(__file__).parent.parent
    found = command.found_in(root / "bench/results/2026-11-22-study")
    assert found.results
    assert stale(root / "docs/study.md", found) == [], "latro study --report --document docs/study.md makes it anew"
