"""The page that `report` writes: parsed back, its curves measured, and whatever a model may write kept as text."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pytest

from latro.report import ReportError, report
from latro.report.chart import CHARTS, Point, round_step, step_axis, thin, value_axis
from latro.report.typeset import number

VOID = {"meta", "br", "link", "img", "input"}
EVIL = """</div></pre><script>alert(1)</script><img src=x onerror="alert(2)">'"><svg onload=alert(3)>&lt;b&gt; <!-- """


class Node:
    def __init__(self, tag, attributes, parent=None):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def find(self, tag=None, **attributes):
        """kind= is a class of several, other names are attributes."""
        kind = attributes.pop("kind", None)
        return [
            node
            for node in self.walk()
            if (tag is None or node.tag == tag)
            and (kind is None or kind in (node.attributes.get("class") or "").split())
            and all(node.attributes.get(name.replace("_", "-")) == value for name, value in attributes.items())
        ]


class Page(HTMLParser):
    """A tree; tags that are not closed where they should be are an error."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.root = self.at = Node("root", {})
        self.feed(self.source)
        self.close()
        assert self.at is self.root

    def handle_starttag(self, tag, attributes):
        node = Node(tag, dict(attributes), self.at)
        self.at.children.append(node)
        if tag not in VOID:
            self.at = node

    def handle_startendtag(self, tag, attributes):
        self.at.children.append(Node(tag, dict(attributes), self.at))

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)

    def chart(self, key):
        (figure,) = self.root.find("figure", data_key=key)
        return figure


def rationale(text="b2", reward=-1.0, **other):
    base = {"text": text, "answer_text": "#7", "reward": reward, "advantage": 0.5, "answer_logp": -0.25, "kl": 0.125}
    return base | {"ended_by": "stop", "length": 4} | other


def prompt(step, id="p1", rationales=None, **other):
    sampled = [rationale("good", -0.5), rationale("bad", -5.0)] if rationales is None else rationales
    return {"step": step, "id": id, "prompt": f"prompt of {id}", "answer": "7", "rationales": sampled} | other


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def train_line(step, **other):
    values = {"reward": -4 / step, "kl": 0.01 * step, "answer_logp": -3 / step, "rationale_length": 5.0 + step}
    return {"step": step, "epoch": step / 10, **values, "truncated_frac": 0.25, "grad_norm": 1.5, "loss": 0.5} | other


def eval_line(step, accuracy):
    return {
        "step": step,
        "eval_accuracy": accuracy,
        "eval_accuracy_low": accuracy - 0.1,
        "eval_accuracy_high": accuracy + 0.05,
        "eval_answer_logp": -accuracy,
    }


@pytest.fixture
def write(tmp_path):
    """Writes a run's folder and parses its page."""

    def write_run(metrics=None, rationales=None, about=None):
        metrics = [train_line(step) for step in range(1, 21)] if metrics is None else metrics
        for name, content in (("metrics.jsonl", metrics), ("rationales.jsonl", rationales)):
            if content is not None:
                text = content if isinstance(content, str | bytes) else lines(content)
                (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        if about is not None:
            (tmp_path / "run.json").write_text(about if isinstance(about, str) else json.dumps(about))
        return Page(report(tmp_path))

    return write_run


def measured(figure, curve=0, kind="line"):
    """The curve's stretches of (step, value) as its path draws them, and half a unit of its precision."""
    (svg,) = figure.find("svg")
    left, right, bottom, top = map(float, svg.attributes["data-plot"].split())
    (x0, x1), (y0, y1) = (map(float, svg.attributes[name].split()) for name in ("data-x", "data-y"))
    path = figure.find("g", kind="curve")[curve].find("path", kind=kind)[0].attributes["d"]
    stretches = [
        [
            (x0 + (x - left) / (right - left) * (x1 - x0), y0 + (bottom - y) / (bottom - top) * (y1 - y0))
            for x, y in (map(float, point.removesuffix("h0").split()) for point in stretch.split("L"))
        ]
        for stretch in path.split("M")[1:]
    ]
    return stretches, 0.051 * (x1 - x0) / (right - left), 0.051 * (y1 - y0) / (bottom - top)


def assert_draws(figure, expected, curve=0):
    stretches, across, up = measured(figure, curve)
    drawn = [point for stretch in stretches for point in stretch]
    assert len(drawn) == len(expected)
    for (step, value), (wanted_step, wanted) in zip(drawn, sorted(expected.items()), strict=True):
        assert step == pytest.approx(wanted_step, abs=across)
        assert value == pytest.approx(wanted, abs=up)


# The page


def test_one_file_that_loads_nothing(write, tmp_path):
    page = write(rationales=[prompt(1)], about={"model": "m", "dataset": "d"})
    assert not [node for node in page.root.walk() if {"src", "href", "action", "style"} & node.attributes.keys()]
    assert not re.search(r"https?:|url\(|@import|fetch\(|import ", page.source)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "rationales.jsonl",
        "report.html",
        "run.json",
    ]


def test_the_browser_is_told_to_run_our_script_alone(write):
    page = write()
    (script,) = page.root.find("script")
    (policy,) = page.root.find("meta", http_equiv="Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert policy.attributes["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def test_the_page_goes_where_it_is_asked_to(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines([train_line(1)]))
    to = tmp_path / "elsewhere.html"
    assert report(str(tmp_path), to) == to
    assert to.exists()
    assert report(tmp_path) == tmp_path / "report.html"


@pytest.mark.parametrize(
    ("about", "heading"),
    [
        ({"model": "tiny", "dataset": "prog"}, "tiny on prog"),
        ({"dataset": "prog"}, "prog"),
        ({"model": None}, "A LaTRO run"),
        (None, "A LaTRO run"),
    ],
)
def test_heading(write, about, heading):
    page = write(about=about)
    assert [page.root.find(tag)[0].text for tag in ("title", "h1")] == [heading] * 2
    subtitle = page.root.find("header")[0].find("p")[0].text
    assert re.match(r"\d{4}-\d\d-\d\d · step 20 · epoch 2\.00 · ", subtitle)


def contrast(first, second):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_both_schemes(write):
    schemes = re.findall(r":root \{(.*?)\}", write().source, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
        for name in ("ink", "soft", "first", "second", "warn"):
            assert contrast(colors[name], colors["paper"]) >= 4.5, name
        for name in ("ink", "soft"):
            assert contrast(colors[name], colors["wash"]) >= 4.5, name


# Curves


def test_every_chart_is_there(write):
    page = write([train_line(step) for step in range(1, 21)] + [eval_line(0, 0.2), eval_line(20, 0.8)])
    training = page.root.find("section", kind="charts")[0]
    assert [figure.attributes["data-key"] for figure in training.find("figure")] == [chart.key for chart in CHARTS]
    assert [figure.attributes["data-key"] for figure in page.root.find("figure")][len(CHARTS) :] == ["loss"]


def test_a_key_that_is_not_known_has_a_chart_with_its_evaluation(write):
    page = write([train_line(1, novel=1, eval_novel=2), train_line(2, novel=3, eval_novel=4, **{"eval_a/b": 0.5})])
    assert [curve.attributes["class"] for curve in page.chart("novel").find("g")] == ["curve s0", "curve s1"]
    assert_draws(page.chart("novel"), {1: 1, 2: 3}, curve=0)
    assert_draws(page.chart("novel"), {1: 2, 2: 4}, curve=1)
    assert_draws(page.chart("eval_a/b"), {2: 0.5})


def test_curves_are_drawn_to_scale(write):
    page = write([train_line(step) for step in range(1, 21)])
    assert_draws(page.chart("reward"), {step: -4 / step for step in range(1, 21)})
    assert_draws(page.chart("kl"), {step: 0.01 * step for step in range(1, 21)})
    assert_draws(page.chart("truncated_frac"), dict.fromkeys(range(1, 21), 25))
    points = page.chart("reward").find("g", kind="curve")[0].attributes["data-points"].split(" ")
    assert points[:4] == ["1", "-4", "2", "-2"]


def test_ticks_stand_at_what_they_say(write):
    (svg,) = write([train_line(step) for step in range(1, 121)]).chart("kl").find("svg")
    left, right, bottom, top = map(float, svg.attributes["data-plot"].split())
    steps = {float(node.attributes["x"]): float(node.text) for node in svg.find("text", kind="x")}
    assert list(steps.values()) == [20, 40, 60, 80, 100, 120]
    for x, step in steps.items():
        assert x == pytest.approx(left + (step - 1) / 119 * (right - left), abs=0.06)
    heights = {float(node.attributes["y"]): float(node.text) for node in svg.find("text", kind="y")}
    assert list(heights.values()) == [0, 0.2, 0.4, 0.6, 0.8, 1, 1.2]
    for y, value in heights.items():
        assert y == pytest.approx(bottom + value / 1.2 * (top - bottom), abs=0.06)


def test_the_last_value_is_written_at_its_height(write):
    page = write([train_line(1, kl=0), train_line(2, kl=0.75), train_line(3, kl=1)])
    (label,) = page.chart("kl").find("text", kind="last")
    (svg,) = page.chart("kl").find("svg")
    assert (label.text, float(label.attributes["y"])) == ("1.00", float(svg.attributes["data-plot"].split()[3]))


def test_last_values_that_meet_are_kept_apart(write):
    page = write([train_line(1, kl=1, eval_kl=5), train_line(2, kl=2.02, eval_kl=2)])
    upper, lower = (float(label.attributes["y"]) for label in page.chart("kl").find("text", kind="last"))
    assert lower - upper >= 12
    assert [label.text for label in page.chart("kl").find("text", kind="last")] == ["2.02", "2.00"]


def test_the_interval_of_accuracy(write):
    page = write([eval_line(0, 0.2), eval_line(50, 0.4), eval_line(100, 0.8)])
    figure = page.chart("eval_accuracy")
    assert_draws(figure, {0: 20, 50: 40, 100: 80})
    (svg,) = figure.find("svg")
    _, _, bottom, top = map(float, svg.attributes["data-plot"].split())
    y0, y1 = map(float, svg.attributes["data-y"].split())
    path = figure.find("path", kind="whiskers")[0].attributes["d"]
    ends = [tuple(map(float, ends)) for ends in re.findall(r"M[\d.]+ ([\d.]+)h4m-2 0V([\d.]+)m-2 0h4", path)]
    assert len(ends) == 3
    for (low, high), accuracy in zip(ends, (20, 40, 80), strict=True):
        drawn = [y0 + (bottom - at) / (bottom - top) * (y1 - y0) for at in (low, high)]
        assert drawn == pytest.approx([accuracy - 10, accuracy + 5], abs=0.1)
    assert page.root.find("figure", data_key="eval_accuracy_low") == []


def test_values_that_are_not_finite_are_gaps(write):
    values = [1, 2, math.nan, 4, math.inf, None, 7, -math.inf, 9, 10]
    page = write([train_line(step, grad_norm=value) for step, value in enumerate(values, start=1)])
    figure = page.chart("grad_norm")
    stretches, _, _ = measured(figure)
    assert [len(stretch) for stretch in stretches] == [2, 1, 1, 2]
    # A line to nowhere, which is drawn as a dot.
    assert figure.find("path", kind="line")[0].attributes["d"].count("h0") == 2
    assert_draws(figure, {1: 1, 2: 2, 4: 4, 7: 7, 9: 9, 10: 10})
    assert figure.find("span", kind="lost")[0].text == "4 not finite"
    assert figure.find("path", kind="lost")[0].attributes["d"].count("M") == 4


def test_a_key_that_is_never_finite(write):
    page = write([train_line(1, reward=math.nan), train_line(2, reward=math.nan)])
    assert page.chart("reward").find("g", kind="curve") == []
    assert page.chart("reward").find("span", kind="lost")[0].text == "2 not finite"
    assert "not finite" in page.root.find("dl", kind="figures")[0].text


def test_ten_thousand_steps_stay_small_and_lose_no_extreme(write):
    def reward(step):
        return {4321: 77.5, 8765: -99.25}.get(step, math.sin(step * step))

    keys = [f"other_{n}" for n in range(12)]
    page = write([train_line(s, reward=reward(s), **{key: math.cos(s * s) for key in keys}) for s in range(1, 10_001)])
    assert len(page.source) < 1_500_000
    stretches, across, up = measured(page.chart("reward"))
    (drawn,) = stretches
    assert len(drawn) < 1000
    for step, value in ((4321, 77.5), (8765, -99.25), (1, reward(1)), (10_000, reward(10_000))):
        assert any(abs(x - step) <= across and abs(y - value) <= up for x, y in drawn), step


def test_a_crowded_curve_has_its_mean(write):
    page = write([{"step": step, "kl": step % 2, "loss": 1.0 if step < 500 else math.nan} for step in range(4000)])
    (mean,), _, up = measured(page.chart("kl"), kind="mean")
    assert [value for _, value in mean] == pytest.approx([0.5] * len(mean), abs=0.05 + up)  # about 20 steps a pixel
    assert [step for step, _ in mean] == sorted(step for step, _ in mean)
    assert len(measured(page.chart("loss"), kind="mean")[0]) == 1
    assert write().root.find(kind="crowded") == []


def test_many_gaps_stay_small(write):
    page = write([{"step": step, "loss": math.nan if step % 2 else step} for step in range(10_000)])
    assert len(page.source) < 100_000


def test_thinning_keeps_what_can_be_seen_of_a_column():
    points = [Point(step, math.nan if step in (25, 26, 250) else math.sin(step**1.7)) for step in range(1000)]
    stretches = thin(points, lambda step: step // 20)
    kept = [point for stretch in stretches for point in stretch]
    assert kept == sorted(kept)
    assert [stretch[0].step > 26 for stretch in stretches][:2] == [False, True]
    assert len(stretches) == 3
    for column in range(50):
        finite = [p for p in points if p.step // 20 == column and not math.isnan(p.value)]
        there = [p for p in kept if p.step // 20 == column]
        assert {min(finite, key=lambda p: p.value), max(finite, key=lambda p: p.value)} <= set(there)
        assert (there[0], there[-1]) == (finite[0], finite[-1])
        assert len(there) <= 4


@pytest.mark.parametrize(
    "values",
    [
        [0, 1],
        [-4, -0.2],
        [3, 3],
        [0, 0],
        [],
        [1e-6, 2e-6],
        [0.3, 0.30001],
        [1, 1 + 1e-15],
        [-1e299, 1e299],
        [0, 5e-324],
        [99_999, 100_003],
        [-17, 1234.5],
    ],
)
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_value_axis_covers_the_values_with_round_ticks(values, from_zero):
    axis = value_axis(values, from_zero)
    assert 3 <= len(axis.ticks) <= 9
    assert (axis.low, axis.high) == (axis.ticks[0], axis.ticks[-1])
    slack = 1e-5 * (axis.high - axis.low)
    assert all(axis.low - slack <= value <= axis.high + slack for value in values)
    assert not from_zero or axis.low <= 0 <= axis.high
    step = axis.ticks[1] - axis.ticks[0]
    leading = float(f"{step:e}".split("e")[0])
    assert min(abs(leading - nice) for nice in (1, 2, 5, 10)) < 1e-5
    labels = [axis.label(tick) for tick in axis.ticks]
    assert all(len(label) <= 8 for label in labels)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (1, 2), (7, 120), (1, 10_000), (0, 1_000_000)])
def test_a_step_axis_has_whole_ticks_within_the_steps(first, last):
    axis = step_axis(first, last)
    assert axis.ticks
    assert all(tick == int(tick) and axis.low <= tick <= axis.high for tick in axis.ticks)
    assert axis.low <= first <= last <= axis.high
    assert len(axis.ticks) <= 7


@pytest.mark.parametrize(("about", "step"), [(1, 1), (1.3, 1), (1.6, 2), (29.75, 20), (3.4, 5), (8, 10), (8e-7, 1e-6)])
def test_round_steps(about, step):
    assert round_step(about) == pytest.approx(step)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.4567, "−0.457"),
        (1, "1.00"),
        (12.345, "12.3"),
        (999.96, "1,000"),
        (12345.6, "12,346"),
        (1.25e-6, "1.25e−6"),
        (-2e7, "−2e7"),
        (math.nan, "not finite"),
        (-math.inf, "not finite"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


# Figures


def figures(page):
    return [
        tuple(node.text for node in part.find("dt") + part.find("dd"))
        for part in page.root.find("dl", kind="figures")[0].find("div")
    ]


def test_headline_with_results(write):
    results = {
        "after": {"accuracy": 0.971, "interval": [0.953, 0.983], "n": 1512},
        "before": {"accuracy": 0.184, "interval": [0.15, 0.22], "n": 1512},
        "rft": {"accuracy": 0.5},
        "sft_answers": None,
    }
    assert figures(write(about={"results": results})) == [
        ("Accuracy before", "18.4 %", "15.0 to 22.0 %, n = 1,512"),
        ("Accuracy after", "97.1 %", "95.3 to 98.3 %, n = 1,512"),
        ("Accuracy, rft", "50.0 %", ""),
        ("Last reward", "−0.200", "−4.00 at step 1"),
        ("Last answer log-prob", "−0.150", "−3.00 at step 1"),
        ("Last rationale length", "25.0", "6.00 at step 1"),
    ]


def test_headline_without_results_is_of_the_evaluations(write):
    evaluations = [eval_line(0, 0.2) | {"eval_n": 512}, eval_line(10, 0.4), {"step": 20, "eval_accuracy": 0.8}]
    assert figures(write(evaluations)) == [
        ("Accuracy, step 0", "20.0 %", "10.0 to 25.0 %, n = 512"),
        ("Accuracy, step 20", "80.0 %", ""),
    ]
    assert figures(write([eval_line(5, 0.5)])) == [("Accuracy, step 5", "50.0 %", "40.0 to 55.0 %")]


def test_options_and_versions(write):
    page = write(about={"options": {"beta": 0.05, "stop_strings": ["#"], "model": "π"}, "versions": {"torch": "2.11"}})
    rows = [tuple(cell.text for cell in row.find("th") + row.find("td")) for row in page.root.find("tr")]
    assert rows == [("beta", "0.05"), ("stop_strings", '["#"]'), ("model", "π"), ("torch", "2.11")]
    assert write(about={}).root.find("table") == []


# Rationales


def test_best_and_worst_of_the_first_and_last_step(write):
    sampled = [rationale("middle", -2), rationale("worst", -9), rationale("lost", math.nan), rationale("best", -0.1)]
    page = write(rationales=[prompt(1, "a"), prompt(50, "b"), prompt(99, "c", sampled), prompt(99, "a")])
    shown = {
        part.find("dd")[2].text: [
            (card.find("h4")[0].text, card.find(kind="text")[0].text) for card in part.find(kind="rationale")
        ]
        for part in page.root.find("details", kind="prompt")
    }
    good_and_bad = [("Best of 2, reward −0.500", "good#7"), ("Worst, reward −5.00", "bad#7")]
    assert shown == {
        "a": good_and_bad * 2,
        "c": [("Best of 4, reward −0.100", "best#7"), ("Worst, reward not finite", "lost#7")],
    }
    assert [step.text for step in page.root.find(kind="step")] == [
        "Step 1 rewards −0.500, −5.00",
        "Step 99 rewards −0.500, −5.00",
        "Step 99 rewards −0.100, −2.00, −9.00, not finite",
    ]


def test_prompts_of_early_and_late_steps_differ(write):
    page = write(rationales=[prompt(step, f"{step}-{n}") for step in (1, 2, 3) for n in range(9)])
    parts = page.root.find("details", kind="prompt")
    assert [part.find("dd")[2].text for part in parts] == [f"{step}-{n}" for step in (3, 1) for n in range(6)]
    assert ["open" in part.attributes for part in parts] == ([True] + [False] * 5) * 2


def test_one_step_and_one_rationale(write):
    page = write(rationales=[prompt(5, rationales=[rationale("", -1, kl=None, ended_by="length")])])
    (card,) = page.root.find(kind="rationale")
    assert card.find(kind="text")[0].text == "(empty)#7"
    facts = "advantage 0.500, log p(answer) −0.250, 4 tokens, cut off"
    assert card.find("p")[0].text == facts


def test_without_rationales(write):
    assert "None were recorded" in write().source


@pytest.mark.parametrize(
    "text", [EVIL, "\n\n  two\t spaces  \n", "a\u202eb é 漢 🙂", "${heading} $charts {x}", "&amp;#60;"]
)
def test_text_stays_text(write, text):
    page = write(
        [train_line(1, **{text: 1.0})],
        [prompt(1, text, [rationale(text), rationale("x", -9, answer_text=text)], prompt=text, answer=text)],
        {
            "model": text,
            "dataset": text,
            "options": {text: text},
            "versions": {"v": [text]},
            "results": {text: {"accuracy": 1}},
        },
    )
    assert len(page.root.find("script")) == 1
    assert not page.root.find("img")
    assert not [node for node in page.root.walk() if any(name.startswith("on") for name in node.attributes)]
    texts = [node.text for node in page.root.find(kind="text")]
    assert texts == [text, text, text + "#7", "x" + text]
    assert page.root.find("h1")[0].text == f"{text} on {text}"
    assert page.root.find("tr")[0].find("td")[0].text == text
    assert page.root.find("figure", data_key=text)
    assert re.search(r"\.text \{[^}]*white-space: break-spaces", page.source)
    # A browser drops a line break right after <pre>.
    assert not page.root.find("pre")


def test_what_html_has_no_place_for_is_made_visible(write):
    page = write(rationales=[prompt(1, rationales=[rationale("a\x00b\x1bc\x7fd\ud800e", -1)])])
    assert page.root.find(kind="rationale")[0].find(kind="text")[0].text == "a␀b␛c␡d\ufffde#7"


# Files


def test_a_resumed_run_repeats_steps(write):
    before = [train_line(step, reward=-100) for step in (1, 2, 3)]
    after = [train_line(step, reward=-step) for step in (2, 3, 4)]
    evaluation = [{"step": 3, "eval_reward": -50}]
    page = write(before + evaluation + after, [prompt(2), prompt(3, answer="old"), prompt(3, answer="new")])
    assert_draws(page.chart("reward"), {1: -100, 2: -2, 3: -3, 4: -4})
    assert_draws(page.chart("reward"), {3: -50}, curve=1)
    assert "new" in page.source
    assert "old" not in [node.text for node in page.root.find("dd")]


@pytest.mark.parametrize("cut", [1, 12, -1, -2])
def test_a_half_written_last_line_is_left_out(write, cut):
    last = lines([train_line(3)])[:-1].encode()[:cut]
    page = write(lines([train_line(1), train_line(2)]).encode() + last, lines([prompt(1)]) + '{"step": 2, "prompt": "')
    assert_draws(page.chart("kl"), {1: 0.01, 2: 0.02})
    assert len(page.root.find(kind="prompt")) == 1


def test_a_last_line_cut_within_a_character_is_left_out(write):
    half = '{"step": 2, "prompt": "é'.encode()[:-1]
    assert len(write(rationales=lines([prompt(1)]).encode() + half).root.find(kind="prompt")) == 1


def test_a_last_line_without_its_line_break_counts(write):
    assert_draws(write(lines([train_line(1), train_line(2)])[:-1]).chart("kl"), {1: 0.01, 2: 0.02})


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ('{"step": 1, "kl": 1}\n{"step": 2, "k\n{"step": 3}\n', r"metrics\.jsonl, line 2: not JSON: "),
        ("\n[1]\n", r"metrics\.jsonl, line 2: the line must be an object with named parts, got \[1\]"),
        ('{"kl": 1}\n', r"metrics\.jsonl, line 1: step must be a whole number, got None"),
        ('{"step": 1.5}\n', r"line 1: step must be a whole number, got 1\.5"),
        ('{"step": true}\n', r"line 1: step must be a whole number, got True"),
        ('{"step": 1, "kl": "0.1"}\n', r"line 1: kl must be a number, got '0\.1'"),
        ('{"step": 1, "kl": [1]}', r"line 1: kl must be a number, got \[1\]"),
    ],
)
def test_malformed_metrics(write, metrics, message):
    with pytest.raises(ReportError, match=message):
        write(metrics)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (prompt(2, prompt=None), "prompt must be a text, got None"),
        (prompt(2, id=7), "id must be a text, got 7"),
        (prompt(2, rationales=[]), r"rationales must be a list that is not empty, got \[\]"),
        (prompt(2, rationales=["z"]), "a rationale must be an object with named parts, got 'z'"),
        (prompt(2, rationales=[{"text": "z"}]), "a rationale must have answer_text, ended_by, reward, advantage, "),
        (prompt(2, rationales=[rationale(reward="high")]), "reward must be a number, got 'high'"),
        (prompt(2, rationales=[rationale(length=4.5)]), r"length must be a whole number, got 4\.5"),
        (prompt(2, rationales=[rationale(ended_by="eos")]), "ended_by must be one of stop, end, length, got 'eos'"),
    ],
)
def test_malformed_rationales(write, record, message):
    with pytest.raises(ReportError, match=r"rationales\.jsonl, line 2: " + message):
        write(rationales=[prompt(1), record, prompt(3)])


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", r"run\.json: not JSON: "),
        ("[]", r"run\.json: the file must be an object"),
        ('{"options": 3}', r"run\.json: options must be an object with named parts, got 3"),
        ('{"results": {"after": 0.5}}', r"run\.json: results\.after must be an object with named parts, got 0\.5"),
        ('{"results": {"after": {"interval": [1]}}}', r"results\.after\.interval must be two numbers, got \[1\]"),
        ('{"results": {"after": {"accuracy": "1"}}}', r"results\.after\.accuracy must be a number, got '1'"),
    ],
)
def test_malformed_about(write, about, message):
    with pytest.raises(ReportError, match=message):
        write(about=about)


@pytest.mark.parametrize("content", [None, b"", b"\n", b'{"step": 1, "re', b'{"step": 1}\n'])
def test_nothing_yet(tmp_path, content):
    run = tmp_path / "run"
    if content is not None:
        run.mkdir()
        (run / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ReportError, match=rf"{re.escape(str(run))}: there is nothing to report yet: .* metrics\.jsonl"):
        report(run)
    assert not (run / "report.html").exists()
