"""The command line, on a tiny random model."""

import json
import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from latro.cli import main, train_options
from latro.config import LatroConfig
from tests.tiny import character_tokenizer, tiny_llama

METRICS = """reward reward_std kl entropy answer_logp advantage_std rationale_length truncated_frac num_tokens loss
    grad_norm completions/mean_length learning_rate""".split()  # noqa: SIM905

REAL = Path(os.environ.get("LATRO_DATA") or Path(__file__).parents[2] / "shared" / "data")
real = pytest.mark.skipif(
    not (REAL / "gsm8k_test.jsonl").is_file(), reason=f"no GSM8K and ARC in {REAL}; name a folder by LATRO_DATA"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer()
    tiny_llama(tokenizer, max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(12)))
    return str(path)


def train_flags(model, dataset, folder, **options):
    options = {
        "max_steps": 2, "num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 2,
        "use_cpu": True, "disable_tqdm": True, "save_steps": 1, **options,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value).lower())]
    return ["train", "--model", model, "--dataset", dataset, "--output_dir", str(folder), *flags]


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_train_resume_eval_sample_report(model, rows, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(train_flags(model, rows, run, validation=4, eval_strategy="steps", eval_steps=1)) == 0
    steps = [line for line in metrics_of(run) if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert set(METRICS) <= steps[0].keys()
    assert [line["step"] for line in metrics_of(run) if "eval_accuracy" in line] == [1, 2]
    assert (run / "checkpoint-2" / "model.safetensors").is_file()
    assert (run / "model.safetensors").is_file()
    assert "update 2/2  reward" in capsys.readouterr().out

    assert main(train_flags(model, rows, run, max_steps=3, resume=True)) == 0
    assert [line["step"] for line in metrics_of(run) if "reward" in line] == [1, 2, 3]

    figures = tmp_path / "eval.json"
    data = ["--dataset", rows, "--max_completion_length", "6"]
    assert main(["eval", model, str(run), *data, "--majority", "3", "--json", str(figures)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"accuracy +\d\.\d{3}  \[", said)
    assert "95 % interval" in said
    found = json.loads(figures.read_text())
    assert found["model"]["metrics"]["n"] == 12
    assert found["difference"]["answer_logp"]["n"] == 12

    assert main(["sample", str(run), *data, "--num_generations", "3"]) == 0
    said = capsys.readouterr().out
    rewards = [float(value) for value in re.findall(r"log p\(answer\) (-?[\d.]+)", said)]
    assert len(rewards) == 3
    assert rewards == sorted(rewards, reverse=True)

    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
def test_training_leaves_its_process_group(model, rows, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert main(train_flags(model, rows, tmp_path / "run", max_steps=1)) == 0
    assert not dist.is_initialized()


@real
@pytest.mark.parametrize("dataset", ["gsm8k", "arc"])
def test_real_data(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("LATRO_DATA", str(REAL))
    assert main(train_flags(model, dataset, tmp_path / "run", limit=8, num_generations=2)) == 0
    assert len([line for line in metrics_of(tmp_path / "run") if "reward" in line]) == 2
    assert main(["eval", model, "--dataset", dataset, "--limit", "4", "--max_completion_length", "6"]) == 0


def test_a_file_of_options_and_flags_that_count_more(tmp_path):
    path = tmp_path / "run.yaml"
    options = {
        "model": "m",
        "dataset": "gsm8k",
        "output_dir": str(tmp_path),
        "beta": 0.25,
        "stop_strings": ["A", "B C"],
    }
    path.write_text(yaml.safe_dump({**options, "disable_dropout": False, "use_cpu": True}))
    run, config = train_options(["--config", str(path), "--beta", "0.5"])
    assert (run.model, run.dataset) == ("m", "gsm8k")
    assert (config.beta, config.stop_strings, config.disable_dropout) == (0.5, ["A", "B C"], False)


def test_help_names_every_option(capsys):
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    for name in LatroConfig.__annotations__:
        assert f"--{name} " in said
    for command in ([], ["eval"], ["sample"], ["report"], ["demo"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "gsm8k"], "--model must be given"),
        (["train", "--model", "m", "--dataset", "d", "--num_generations", "1"], "num_generations must be at least 2"),
        (["train", "--model", "m", "--dataset", "d", "--no_such", "1"], "there is no option --no_such"),
        (["report", "nowhere"], "nowhere"),
        (["eval", "m", "--dataset", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
