"""Training goes on from wherever its process died as if nothing had been, and checkpoints are whole or not there."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from latro import checkpoint
from latro.checkpoint import UNFINISHED, load_weights, newest, publish
from latro.watch import NotFiniteError
from tests.checkpoint_job import trainer_of
from tests.families import SUPPORTED, tiny_model
from tests.tiny import character_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "each update samples its own": {},
    # One round of sampling serves six of an epoch's eight updates, and another one the rest.
    "sampled ahead": {
        "steps_per_generation": 6,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_steps": 1,
        "max_steps": 10,
    },
}


class Jobs:
    """Those of checkpoint_job."""

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.checkpoint_job"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)

    def run(self, folder, kill_after=None, **job):
        """-> the exit code; the negative number of the signal that ended it."""
        folder.mkdir(exist_ok=True)
        print(json.dumps({"folder": str(folder), **job}), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(answer["began"], signal.SIGKILL)
        return answer["ended"] if "ended" in answer else json.loads(self.process.stdout.readline())["ended"]


@pytest.fixture(scope="module")
def jobs():
    with Jobs() as jobs:
        yield jobs


@pytest.fixture(scope="module")
def uninterrupted(jobs, tmp_path_factory):
    """Of each of SETTINGS, the folder of a run that nothing ended before its time."""
    folders = {}

    def of(setting):
        if setting not in folders:
            folders[setting] = tmp_path_factory.mktemp("uninterrupted")
            assert jobs.run(folders[setting], config=SETTINGS[setting], moments={}) == 0
        return folders[setting]

    return of


def lines(path, *key):
    """The lines of a run's file by their key, without those that tell of time. Of one key all must be alike."""
    found = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "train_runtime" not in record:
            assert found.setdefault(tuple(record[name] for name in key), record) == record
    return found


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def end_of(folder):
    return torch.load(folder / "end.pt", weights_only=True)


def assert_alike(folder, expected):
    """Weights, optimizer and every line, bit for bit."""
    found, wanted = end_of(folder), end_of(expected)
    for part in ("weights", "optimizer", "scheduler"):
        assert equal(found[part], wanted[part]), part
    assert lines(folder / "metrics.jsonl", "step") == lines(expected / "metrics.jsonl", "step")
    rationales = lines(expected / "rationales.jsonl", "step", "id")
    assert len(rationales) > 8
    assert lines(folder / "rationales.jsonl", "step", "id") == rationales
    assert not list(folder.rglob("training_args.bin"))


def test_a_run_learns_and_samples_anew(uninterrupted):
    """Else all that is compared below would be alike by itself."""
    folder = uninterrupted("each update samples its own")
    untrained = tiny_llama(character_tokenizer()).state_dict()
    assert not any(torch.equal(tensor, untrained[name]) for name, tensor in end_of(folder)["weights"].items())
    texts = {r["text"] for one in lines(folder / "rationales.jsonl", "step", "id").values() for r in one["rationales"]}
    assert len(texts) > 20
    files = [uninterrupted("sampled ahead") / f"checkpoint-{n}" / "latro-0-of-1.json" for n in range(1, 11)]
    assert [len(json.loads(file.read_text())["ahead"]) for file in files] == [5, 4, 3, 2, 1, 0, 1, 0, 5, 4]


KILLS = [
    ("each update samples its own", "training", "SIGKILL"),
    ("sampled ahead", "saving", "SIGKILL"),
    ("each update samples its own", "saving", "SIGTERM"),
]


@pytest.mark.parametrize(("setting", "within", "by"), KILLS)
def test_a_run_that_died_at_a_moment_goes_on_as_if_it_had_not(jobs, uninterrupted, tmp_path, setting, within, by):
    expected = uninterrupted(setting)
    calls = end_of(expected)["moments"][within]
    at = random.Random(f"{setting} {within} {by}").randrange(calls // 4, calls // 2)
    ended = jobs.run(tmp_path, config=SETTINGS[setting], moments={"within": within, "at": at, "by": by})
    assert ended == -signal.Signals[by]
    assert newest(tmp_path) is not None
    assert jobs.run(tmp_path, config=SETTINGS[setting]) == 0
    assert_alike(tmp_path, expected)
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_died_again_and_again(jobs, uninterrupted, tmp_path, seed):
    """At calls of functions, in writing a checkpoint or anywhere; then also in time, amid what C++ and Rust write."""
    setting = list(SETTINGS)[seed % len(SETTINGS)]
    expected, drawn = uninterrupted(setting), random.Random(seed)
    calls, deaths, ended = end_of(expected)["moments"], 0, None
    while ended != 0:
        if deaths and drawn.random() < 0.5:
            moment = {"kill_after": drawn.uniform(0, 2)}
        else:
            within = drawn.choice(["training", "saving"])
            moment = {"moments": {"within": within, "at": 1 + drawn.randrange(calls[within] // 2)}}
        ended = jobs.run(tmp_path, config=SETTINGS[setting], **moment)
        assert ended in (0, -signal.SIGKILL)
        deaths += ended != 0
    assert deaths >= 1
    assert_alike(tmp_path, expected)


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(jobs, uninterrupted, tmp_path):
    setting = "each update samples its own"
    weights = (uninterrupted(setting) / "checkpoint-4" / "model.safetensors").stat().st_size
    for size in (weights // 2, weights + 1000):  # too small for the weights; for what the optimizer knows
        folder = tmp_path / str(size)
        assert jobs.run(folder, full={"at_save": 2, "size": size}) == 1
        said = (folder / "log.txt").read_text()
        assert f"OSError: {folder}/checkpoint-4 could not be written" in said
        assert f"free there; the newest whole checkpoint is {folder}/checkpoint-2" in said
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["checkpoint-2"]
        assert newest(folder) == folder / "checkpoint-2"


def test_sigterm_may_be_made_to_write_a_checkpoint_amid_an_update(jobs, uninterrupted, tmp_path):
    setting = "sampled ahead"
    expected = uninterrupted(setting)
    config = {**SETTINGS[setting], "enable_jit_checkpoint": True, "save_strategy": "no"}
    calls = end_of(expected)["moments"]
    at = (calls["training"] - calls["saving"]) // 2
    assert jobs.run(tmp_path, config=config, moments={"at": at, "by": "SIGTERM"}) == 0
    (written,) = tmp_path.glob("checkpoint-*")
    assert newest(tmp_path) == written
    assert jobs.run(tmp_path, config=SETTINGS[setting]) == 0
    assert_alike(tmp_path, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of which the last two checkpoints are kept."""
    trainer = trainer_of(tmp_path_factory.mktemp("saved"), config={"max_steps": 6, "save_total_limit": 2})
    trainer.train()
    trainer.save_model()
    return trainer


def test_the_newest_are_kept(saved):
    folder = Path(saved.args.output_dir)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoint-4", "checkpoint-6"]
    assert newest(folder).name == "checkpoint-6"
    assert not list(folder.rglob("training_args.bin"))


def test_what_is_saved_loads_without_us(saved):
    own = saved.language_model.state_dict()
    for folder in (Path(saved.args.output_dir), newest(Path(saved.args.output_dir))):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert equal(dict(model.state_dict()), dict(own))


@pytest.mark.parametrize("by_path", [True, False])
def test_resuming_as_transformers_has_it(saved, tmp_path, by_path):
    folder = tmp_path / "run"
    shutil.copytree(saved.args.output_dir, folder)
    shutil.rmtree(folder / "checkpoint-6")
    trainer = trainer_of(folder, config={"max_steps": 6})
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if by_path else True)
    assert equal(dict(trainer.language_model.state_dict()), dict(saved.language_model.state_dict()))
    assert equal(trainer.optimizer.state_dict(), saved.optimizer.state_dict())


def test_there_must_be_something_to_resume_from(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_weights_alone_can_be_saved(tmp_path):
    trainer = trainer_of(tmp_path, config={"max_steps": 2, "save_only_model": True})
    trainer.train()
    names = {path.name for path in newest(tmp_path).iterdir()}
    assert names >= {"model.safetensors", "tokenizer.json", "trainer_state.json"}
    assert not any(name.endswith((".pt", ".pth", ".bin")) for name in names)


def test_the_best_is_kept_and_loaded_at_the_end(tmp_path):
    score = {2: 0.1, 4: 0.9, 6: 0.3}
    config = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "save_total_limit": 1,
    }

    def trainer():
        made = trainer_of(tmp_path, config=config, eval_dataset=[{"prompt": "1 + 1 = ?", "answer": "2"}])
        made.evaluate = lambda **options: {"eval_score": score[made.state.global_step]}
        return made

    first = trainer()
    first.train()
    best = tmp_path / "checkpoint-4"
    assert first.state.best_model_checkpoint == str(best)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [best]
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert equal(dict(first.language_model.state_dict()), load_file(best / "model.safetensors"))

    second = trainer()  # the update after the best one once more
    second.train(resume_from_checkpoint=True)
    assert second.state.best_model_checkpoint == str(best)
    assert equal(dict(second.language_model.state_dict()), load_file(best / "model.safetensors"))


def test_no_number_stops_training_with_its_batch_saved(tmp_path):
    calls = []

    def reward(prompts, completions, answer):
        calls.append(prompts)
        return [float("nan") if len(calls) == 8 else 0.0] * len(prompts)  # two micro-batches are an update

    trainer = trainer_of(tmp_path, config={"max_steps": 6}, reward_funcs=[reward])
    with pytest.raises(NotFiniteError, match=r"stopped-at-3\.json"):
        trainer.train()
    record = json.loads((tmp_path / "stopped-at-3.json").read_text())
    prompts = [trainer.text.decode(group["prompt"]) for group in record["groups"]]
    assert set(calls[-1]) <= set(prompts)
    assert all(len(group["rationales"]) == 3 for group in record["groups"])
    assert newest(tmp_path) == tmp_path / "checkpoint-2"


def test_an_exploding_gradient_stops_training_with_its_update_saved(tmp_path):
    trainer = trainer_of(tmp_path, config={"max_steps": 6})
    weight = trainer.tree_model.model.lm_head.weight
    weight.register_hook(lambda gradient: gradient * (torch.inf if trainer.state.global_step == 3 else 1))
    with pytest.raises(NotFiniteError, match=r"stopped-at-3\.json"):
        trainer.train()
    record = json.loads((tmp_path / "stopped-at-3.json").read_text())
    assert len(record["groups"]) == 4
    assert newest(tmp_path) == tmp_path / "checkpoint-2"


def test_what_is_pushed_to_the_hub_is_whole(tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def create_repo(self, name, **options):
            return type("Repository", (), {"repo_id": name})

        def upload_folder(self, folder_path, ignore_patterns=(), **options):
            files = {path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*")}
            pushed.append((Path(folder_path).name, {f for f in files if not f.startswith(("_", "checkpoint-"))}))
            return type("Job", (), {"done": lambda self: True})()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    config = {"max_steps": 2, "push_to_hub": True, "hub_model_id": "someone/model", "hub_strategy": "all_checkpoints"}
    trainer_of(tmp_path / "run", config=config).train()
    assert [name for name, _ in pushed] == ["run", "checkpoint-2"]
    assert pushed[0][1] >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert pushed[1][1] >= {"model.safetensors", "optimizer.pt", "files.json"}


# What is whole


def checkpoint_in(run, step, folder=None):
    written = run / UNFINISHED / str(step)
    written.mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (written / name).write_text(f"{name} of {step}")
    publish(written, run / (folder or f"checkpoint-{step}"))


def test_what_is_not_whole_is_not_resumed_from(tmp_path):
    assert newest(tmp_path / "none") is None
    for step in (9, 10, 100):
        checkpoint_in(tmp_path, step)
    checkpoint_in(tmp_path, 200, "checkpoint-best")
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / UNFINISHED / "checkpoint-300")
    assert newest(tmp_path) == tmp_path / "checkpoint-100"
    (tmp_path / "checkpoint-100" / "model.safetensors").unlink()
    assert newest(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "model.safetensors").write_text("mod")
    assert newest(tmp_path) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-9" / "files.json").write_text('{"model.saf')
    assert newest(tmp_path) is None
    (tmp_path / "checkpoint-400").mkdir()  # as transformers begins one
    (tmp_path / "checkpoint-400" / "trainer_state.json").write_text("{}")
    assert newest(tmp_path) is None


@pytest.mark.parametrize("dies_at", range(1, 8))
def test_one_of_the_name_is_there_while_another_takes_it(tmp_path, monkeypatch, dies_at):
    checkpoint_in(tmp_path, 4)
    steps = []

    def dying(function):
        def step(*args, **options):
            steps.append(function)
            if len(steps) == dies_at:
                raise KeyboardInterrupt
            return function(*args, **options)

        return step

    for module, name in ((os, "replace"), (shutil, "rmtree"), (checkpoint, "sync_folder")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    with contextlib.suppress(KeyboardInterrupt):
        checkpoint_in(tmp_path, 4)
    monkeypatch.undo()
    found = newest(tmp_path)
    assert found.name in ("checkpoint-4", "checkpoint-4.replaced")
    checkpoint_in(tmp_path, 5)
    assert newest(tmp_path).name == "checkpoint-5"


# Weights


def perturbed(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "mixtral", "granitemoe", "qwen3_moe", "youtu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_exactly(tmp_path, family, dtype):
    """Also tied ones, those whose names and shapes in a file are others, and from several files."""
    model = perturbed(tiny_model(family).to(dtype))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    other = tiny_model(family).to(dtype)
    load_weights(other, tmp_path)
    assert equal(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.slow
def test_weights_of_every_family_come_back_exactly(tmp_path):
    for family in SUPPORTED:
        model, other = perturbed(tiny_model(family)), tiny_model(family)
        model.save_pretrained(tmp_path / family)
        load_weights(other, tmp_path / family)
        assert equal(dict(other.state_dict()), dict(model.state_dict())), family


def test_weights_of_another_model_are_refused(tmp_path):
    tokenizer = character_tokenizer()
    tiny_llama(tokenizer, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the weights of a LlamaForCausalLM like this one, got .*missing_keys"):
        load_weights(tiny_llama(tokenizer), tmp_path)


def test_an_adapter_is_saved_alone_and_resumed(tmp_path):
    peft = pytest.importorskip("peft")

    def trainer():
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_llama(character_tokenizer()), options)
        return trainer_of(tmp_path, model, config={"max_steps": 4})

    first = trainer()
    first.train()
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    shutil.rmtree(tmp_path / "checkpoint-4")
    second = trainer()
    second.train(resume_from_checkpoint=True)
    assert equal(dict(second.language_model.state_dict()), dict(first.language_model.state_dict()))
    assert equal(second.optimizer.state_dict(), first.optimizer.state_dict())
