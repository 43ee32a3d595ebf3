"""Self-Explore as a whole: its stages and their resumption, what it refuses, and the commands."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from latro.data import Example
from latro.demo.base import FOLDER
from latro.explore import Search, configs, reading_for, self_explore
from latro.tasks import named
from tests.explored import CHAIN

PROG = named("prog")


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)


def configs_of(folder, **changes):
    common = {
        "max_steps": 2, "per_device_train_batch_size": 8, "max_completion_length": 14, "learning_rate": 1e-3,
        "answer_template": "#{answer}", "stop_strings": ["#"], "separator": "", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "seed": 3, **changes,
    }  # fmt: skip
    return configs(folder, common, dpo={"learning_rate": 1e-3}, also_dpo=True)


def self_explored(base, folder, examples, changes=None, **options):
    return self_explore(
        *base,
        examples,
        folder,
        configs_of(folder, **(changes or {})),
        reading=reading_for("prog"),
        search=Search(samples=6, kept=2),
        **options,
    )


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_whole_pipeline_and_its_resumption(base, tmp_path, monkeypatch):
    examples, questions = PROG.problems(0, 24), PROG.problems(0, 8, "validation")
    before = weights(base[0])
    found = self_explored(base, tmp_path, examples, evaluation=questions)
    assert torch.equal(weights(base[0]), before)
    assert list(found.stages) == ["base", "sft", "rft", "dpo", "self_explore"]
    assert [stage.updates for stage in found.stages.values()] == [0, 2, 2, 2, 2]
    assert all(len(stage.evaluation.records) == 8 for stage in found.stages.values())
    samples, pairs, granular = (found.counts[name] for name in ("samples", "pairs", "granular pairs"))
    assert sum(samples.values()) == 24 * 6
    assert samples["kept"] == pairs["paired"] + pairs["right, but there is no wrong one left"]
    assert sum(granular.values()) == pairs["paired"] > 0 and granular["paired"] > 0
    for name in ("sft", "rft", "dpo", "self_explore"):
        assert (tmp_path / name / "model.safetensors").is_file()

    monkeypatch.setattr("latro.explore.pipeline.LatroTrainer.train", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr("latro.explore.pipeline.rejection_samples", lambda *given, **more: pytest.fail("sampled again"))
    again = self_explored(base, tmp_path, examples, evaluation=questions, resume=True)
    assert torch.equal(weights(again.model), weights(found.model))
    assert (again.stages, again.counts) == (found.stages, found.counts)
    with pytest.raises(ValueError, match="is of a run with other configs; use another folder"):
        self_explored(base, tmp_path, examples, {"learning_rate": 1e-4}, resume=True)


def test_a_run_that_stopped_goes_on_where_it_was(base, tmp_path, monkeypatch):
    examples = PROG.problems(0, 16)
    whole = self_explored(base, tmp_path / "whole", examples)

    def killed(*given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("latro.explore.pipeline.explore", killed)
        with pytest.raises(KeyboardInterrupt):
            self_explored(base, tmp_path / "other", examples)
    resumed = self_explored(base, tmp_path / "other", examples, resume=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_without_pairs_the_model_stays_that_of_rft(base, tmp_path, caplog):
    examples = PROG.problems(0, 4)
    never = [Example(one.id, one.prompt, "x" * 0 or "9-9", rationale=one.rationale) for one in examples]
    found = self_explored(base, tmp_path, never)
    assert found.counts["samples"]["kept"] == found.counts["granular pairs"]["paired"] == 0
    assert found.stages["self_explore"].updates == 0
    assert "there is nothing to learn from" in caplog.text


@pytest.mark.parametrize(
    ("examples", "changes", "options", "message"),
    [
        ([], {}, {}, "self_explore: examples must hold at least one example, got none"),
        ([Example("a", "p", "1")], {}, {}, "golden must hold at least one example, got none"),
        ([CHAIN, CHAIN], {}, {}, "examples must have different ids"),
        ([CHAIN], {}, {"golden": [Example("a", "p", "1")]}, "golden examples must have a rationale, got none for a"),
    ],
)
def test_what_the_pipeline_refuses(base, tmp_path, examples, changes, options, message):
    with pytest.raises(ValueError, match=message):
        self_explored(base, tmp_path, examples, changes, **options)


def test_configurations_that_do_not_fit_together_are_refused(base, tmp_path):
    good = configs_of(tmp_path)
    assert {name: (one.objective, one.optim) for name, one in good.items()} == {
        "sft": ("sft_golden", good["sft"].optim),
        "rft": ("sft_golden", good["sft"].optim),
        "self_explore": ("dpo", "rmsprop"),
        "dpo": ("dpo", "rmsprop"),
    }
    other = configs_of(tmp_path, max_completion_length=15)
    for changed, message in (
        ({name: good[name] for name in ("sft", "rft")}, "configs must be of sft, rft, self_explore and perhaps dpo"),
        (good | {"rft": good["dpo"]}, "rft must have objective sft_golden, got dpo"),
        (good | {"dpo": other["dpo"]}, "max_completion_length must be the same in sft and dpo, got 14 and 15"),
    ):
        with pytest.raises(ValueError, match=message):
            self_explore(*base, PROG.problems(0, 4), tmp_path, changed)


def test_the_commands(base, tmp_path, capsys):
    from latro.cli import main

    data = ["--dataset", "prog", "--limit", "6"]
    page = tmp_path / "page.html"
    assert main(["explore", str(FOLDER), *data, "--num_generations", "3", "--all", "--to", str(page)]) == 0
    said = capsys.readouterr().out
    assert "(before the first step)" in said and "18 rationales are different" in said
    assert page.read_text().count("<h3>") == said.count("(before the first step)")

    run = tmp_path / "run"
    flags = ["--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no",
             "--per_device_train_batch_size", "4", "--learning_rate", "1e-3", "--dpo.max_steps", "1"]  # fmt: skip
    options = ["--model", str(FOLDER), *data, "--output_dir", str(run), "--samples", "4", "--test_limit", "8"]
    assert main(["self-explore", *options, *flags]) == 0
    said = capsys.readouterr().out
    assert "accuracy on 8 questions" in said and "granular pairs" in said
    assert (run / "self_explore" / "model.safetensors").is_file() and (run / "results.json").is_file()
    assert main(["self-explore", *options, *flags, "--no_such", "1"]) == 1
    assert "there is no option --no_such" in capsys.readouterr().err
    assert main(["self-explore", "--model", str(FOLDER), "--dataset", "prog"]) == 1
    assert "--output_dir must be given" in capsys.readouterr().err
    assert main(["self-explore", "--help"]) == 0
    assert "--continuations" in capsys.readouterr().out


def test_options_of_one_training():
    from latro.cli import self_explore_options

    flags = ["--dataset", "chain", "--output_dir", "o", "--learning_rate", "1e-3", "--also_dpo", "true"]
    flags += ["--sft.max_steps", "7", "--dpo.beta", "0.3"]
    options, found = self_explore_options([*flags, "--use_cpu", "true"])
    assert options.temperature == 0.7
    assert list(found) == ["sft", "rft", "self_explore", "dpo"]
    assert [one.max_steps for one in found.values()] == [7, -1, -1, -1]
    assert [one.learning_rate for one in found.values()] == [1e-3, 1e-3, 1e-6, 1e-6]
    assert found["dpo"].beta == found["self_explore"].beta == 0.3
    assert found["sft"].answer_template == "#{answer}" and found["sft"].stop_strings == ["#"]
