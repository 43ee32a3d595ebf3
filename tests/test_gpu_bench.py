"""The benchmarks for a GPU run on a CPU at toy size, find ours right, and bar what is wrong."""

import json
import math
import os
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, gpu_head, gpu_measure, gpu_step, render
from bench.measure import Case
from latro_kernels import _gpu

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lines():
    """What the process of each question would write."""
    options = gpu_measure.Options("cpu", True, math.inf)
    return {question: list(gpu_measure.question_lines(question, options)) for question in gpu.SHARES}


@pytest.fixture
def found(lines, tmp_path):
    """What all of them make, and the file that it is saved in."""
    options = SimpleNamespace(device="cpu", toy=True, commit="0" * 40, save=False)
    found = gpu.circumstances(options)
    for question, written in lines.items():
        gpu.add(found, question, json.loads(json.dumps(written)))
    found["whole_model"] = {"layers": gpu.WHOLE, "seconds": gpu.whole_model(found["cases"])}
    return found


@pytest.mark.parametrize("question", gpu.SHARES)
def test_every_contestant_is_right(lines, question):
    *cases, last = lines[question]
    assert set(last) == {"circumstances"}
    for line in cases:
        record = line["record"]
        assert record["question"] == question
        assert next(iter(record["contestants"])) == "ours"
        for name, row in record["contestants"].items():
            assert "fault" not in row, (record["case"], name)
            assert row["seconds"] > 0
            assert all(row["dtypes"][key] == "bfloat16" for key in ("dX", "dW") if key in row["dtypes"])
            if name != record["floor"]:
                assert row["error"] < 0.02, (record["case"], name)
    names = [line["record"]["case"] for line in cases]
    assert len(set(names)) == len(names)


def test_every_backend_of_ours_is_a_contestant_on_a_gpu(monkeypatch):
    device, product = torch.device("cuda"), {"product": "fused"}
    for kind in gpu_head.KINDS:
        runs = gpu_head.contestants(kind, device)
        assert set(gpu_head.GPU_OURS) < set(runs)
        assert ("ours, 64 MB" in runs) == (kind.products == 3)
    assert runs[gpu_head.FUSED].keywords.items() > {"impl": "native", **product}.items()
    seen = []
    monkeypatch.setattr(gpu_head, "through_fused_loss", lambda *_, **how: seen.append((how, tile_sizes())))

    def tile_sizes():
        return _gpu.tile_sizes("linear_logprobs.cuda", 64, torch.empty(0, dtype=torch.bfloat16))

    runs[gpu_head.FUSED]({})
    assert seen == [({"frozen": True, "impl": "native", "budget": None}, product)]
    monkeypatch.setattr(gpu_head._gpu, "capability", lambda device: 80)
    assert gpu_head.FUSED not in gpu_head.contestants(kind, device)


@pytest.fixture
def head_measured(found):
    """One case, that of the first goals, in which each backend takes as long as the floor and a half."""
    record = next(record for record in found["cases"] if record["question"] == "head")
    (name, _), *_ = gpu_head.cases(torch.device("cuda"), toy=False)
    rows = record["contestants"] | dict.fromkeys(gpu_head.GPU_OURS, record["contestants"]["ours"])
    rows |= {backend: row | {"seconds": 1.5} for backend, row in rows.items() if backend.startswith("ours")}
    record |= {"case": name, "contestants": rows, "floor_seconds": 1.0}
    gpu_state = {"model": "H", "capability": "9.0", "memory_gib": 1.0}
    return found | {"cases": [record], "hardware": found["hardware"] | {"gpus": [gpu_state]}}


def test_the_readme_shows_what_is_measured_and_what_is_not(head_measured):
    (record,) = head_measured["cases"]
    unmeasured = render.gpu_summary(None).splitlines()
    assert all("| not yet measured |" in line for line in unmeasured[2:])
    assert sum("goal 1.12×" in line for line in unmeasured) == 2
    text = render.gpu_summary(render.RESULTS / "none" / "gpu.json", head_measured)
    measured = [line for line in text.splitlines() if f"| head, {record['case']}" in line]
    assert len(measured) == 1 + len(gpu_head.GPU_OURS)
    assert all(" ms, " in line and "1.50× the time of bare GEMMs" in line for line in measured)
    assert measured[1].startswith(f"| head, {record['case']}, cuda (vendor) |")
    assert measured[1].endswith("1.50× the time of bare GEMMs, goal 1.12× |")
    assert text.count("not yet measured") == len(unmeasured) - 2 - len(measured)
    assert text.endswith("(bench/results/none/roofline.svg)")


def test_a_missed_goal_is_named(head_measured):
    (record,) = head_measured["cases"]
    missed = [line for line in gpu.text(head_measured).splitlines() if line.startswith("goal missed: ")]
    assert len(missed) == len(gpu_head.goals(record["case"])) == 3
    assert f"{gpu_head.FUSED}: 1.500 × floor, allowed are 1.046" in missed[-1]
    for row in record["contestants"].values():
        row["seconds"] = 1.0
    assert "goal missed" not in gpu.text(head_measured)


def test_the_roofline_is_a_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    render.plot_roofline(found, tmp_path / "roofline.svg")
    assert "</svg>" in (tmp_path / "roofline.svg").read_text()


def test_everything_stands_in_the_table(found):
    text = gpu.text(found)
    for record in found["cases"]:
        assert record["case"] in text
        assert set(record["contestants"]) <= set(re.findall(r"^    (\S.*?)  ", text, re.MULTILINE))
    for name in gpu_head.absent():
        assert f"{name} is not measured" in text
    assert f"step of {gpu.WHOLE} layers" in text
    assert "FAILED" not in text


def test_the_file_is_in_a_folder_of_the_day_and_the_gpu(found, tmp_path):
    found["hardware"]["gpus"] = [{"model": "NVIDIA H100 80GB HBM3"}]
    path = gpu.save(found, tmp_path)
    assert path == tmp_path / f"{found['date'][:10]}-nvidia-h100-80gb-hbm3" / "gpu.json"
    saved = json.loads(path.read_text())
    assert saved["commit"] == "0" * 40
    assert saved["cases"] == found["cases"]
    assert {"cold", "hot, after head"} <= set(saved["clocks"])
    assert {"torch", "triton", "cuda"} <= set(saved["versions"])


def a_case(**contestants):
    exact = {"out": torch.arange(1.0, 5)}
    return Case("head", "a case", torch.bfloat16, {}, exact, contestants, flops=8e9, floor="floor")


def test_what_is_wrong_or_fails_has_no_time():
    right = {"out": torch.arange(1.0, 5)}

    def failing(inputs):
        raise RuntimeError("out of\nmemory")

    record = gpu_measure.measure(
        a_case(
            ours=lambda inputs: {"out": torch.tensor([1.0, 2.0, 3.0, 5.0])},
            nan=lambda inputs: {"out": right["out"] * math.nan},
            failing=failing,
            close=lambda inputs: {"out": lambda: right["out"] * 1.01},
            floor=lambda inputs: {},
        ),
        CPU,
        1e12,
        toy=True,
    )
    rows = record["contestants"]
    assert rows["ours"]["fault"].startswith("wrong: relative error 1.8e-01")
    assert rows["nan"]["fault"] == "wrong: relative error nan"
    assert rows["failing"]["fault"] == "RuntimeError: out of"
    assert not any("seconds" in rows[name] for name in ("ours", "nan", "failing"))
    assert rows["close"]["seconds"] > 0
    assert record["floor_seconds"] == rows["floor"]["seconds"]
    assert gpu.failures({"failures": ["x"], "cases": [record]}) == ["x", f"a case: ours: {rows['ours']['fault']}"]


def test_contestants_take_turns():
    order = []
    runs = {name: lambda inputs, name=name: order.append(name) for name in "abc"}
    times = gpu_measure._interleaved(runs, {}, {"a": 4, "b": 4, "c": 2}, gpu_measure._Clock(CPU))
    assert {name: len(taken) for name, taken in times.items()} == {"a": 4, "b": 4, "c": 2}
    assert "".join(order) == "ab" + "cab" + "ba" + "abc"


def test_without_time_cases_are_named_and_passed_over():
    options = gpu_measure.Options("cpu", True, deadline=0.0)
    *notes, last = gpu_measure.question_lines("head", options)
    assert len(notes) == len(list(gpu_head.cases(CPU, True)))
    assert all("there was no time left" in line["note"] for line in notes)
    assert set(last) == {"circumstances"}


def test_a_process_that_ends_badly_leaves_what_it_wrote(tmp_path, capfd):
    path = tmp_path / "lines"
    path.write_text('{"note": "written before"}\n{"rec')
    options = gpu_measure.Options("cpu", True, time.time() + 60)
    first, second = gpu_measure.in_own_process("nothing", options, path)
    assert first == {"note": "written before"}
    assert second == {"failure": "nothing: its process ended with code 1"}


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--device", "cpu"], "--device cpu needs --toy"),
        (["--device", "cpu", "--toy", "--save"], "--save keeps every question at real sizes"),
        (["--device", "cpu", "--toy", "rollout"], "questions are attention, head, step, got rollout"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, rule, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", *arguments])
    with pytest.raises(SystemExit):
        gpu.main()
    assert rule in capsys.readouterr().err


def test_the_whole_model_has_one_head_and_all_layers():
    def record(layers, **seconds):
        rows = {name: {"seconds": value} if value else {"fault": "x"} for name, value in seconds.items()}
        axes = {"P": 1, "K": 1, "layers": layers}
        return {"question": "step", "case": f"sizes {layers} layers", "axes": axes, "contestants": rows}

    head, layer = 0.5, 0.25
    records = [record(n, ours=head + n * layer, other=0 if n == 2 else 1.0) for n in (4, 2)]
    assert gpu_step.whole_model(records) == {"sizes": {"ours": head + gpu_step.WHOLE * layer}}
    assert gpu_step.whole_model(records[:1]) == {}


def test_the_script_is_valid_and_names_tests_that_exist():
    script = ROOT / "bench" / "gpu.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    patterns = re.findall(r"tests/test_\S+?\.py", script.read_text())
    assert len(patterns) > 5
    assert all(list(ROOT.glob(pattern)) for pattern in patterns)
