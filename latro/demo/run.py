"""`latro demo`: a tiny model that can reason but mostly does not, taught by LaTRO from the answers alone.

Beside it the same base is fine-tuned on the same answers: what they give without rationales.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from latro.config import LatroConfig
from latro.data import Example
from latro.demo import base as shipped
from latro.demo import task
from latro.evaluate import Comparison, Evaluation, compare, evaluate
from latro.grading import graders_for
from latro.launch import versions
from latro.metrics import RunLog
from latro.model import TreeModel
from latro.prepare import text_of
from latro.report import report
from latro.text import Text
from latro.trainer import LatroTrainer
from latro_kernels import SelfReward, pack_rationales

UPDATES, PROMPTS, K = 120, 16, 8
TEST_QUESTIONS, WATCHED_QUESTIONS = 512, 128
VOTES = 8
SHOWN = 5  # questions of which completions are printed
LEARNING_RATE = 1e-3


def run(folder: Path, *, seed: int = 0, base: Path | None = None, json_file: Path | None = None) -> dict[str, Any]:
    """-> what is written to json_file: `before`, `after` and `sft_answers`, each with accuracy, interval and n."""
    model, tokenizer = load_base(base)
    config = config_of(folder, seed)
    text = text_of(config, tokenizer)
    train, test = task.problems(seed, UPDATES * PROMPTS), task.problems(seed, TEST_QUESTIONS, "test")
    size, first = sum(parameter.numel() for parameter in model.parameters()), train[0]
    print(f"A model of {size:,} parameters is asked programs modulo ten such as {first.prompt}")
    print(
        f"It can reason, {first.rationale}, but mostly guesses. It will be told answers alone, here {first.answer}.\n"
    )

    before = ask(model, text, test, "asking the base")
    answers_alone = fine_tune_on_answers(copy.deepcopy(model), text, train)
    sft = ask(answers_alone, text, test, "asking the fine-tuned")
    prepare_folder(folder)
    watched = task.problems(seed, WATCHED_QUESTIONS, "validation")
    trainer = LatroTrainer(model, config, train, watched, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    after = ask(model, text, test, "asking the taught")

    results = {"before": summary(before), "after": summary(after), "sft_answers": summary(sft)}
    differences = {"gain": compare(before, after)["accuracy"], "over_sft": compare(sft, after)["accuracy"]}
    described = {"model": "the demo's base", "dataset": "programs modulo ten", "options": shown_options(config)}
    RunLog(folder).describe(**described, versions=versions(), results=results)
    show(before, sft, after, differences)
    print(f"\nCurves and rationales: {report(folder)}")
    found = {**results, **{name: one._asdict() for name, one in differences.items()}}
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def load_base(folder: Path | None) -> tuple[PreTrainedModel, Any]:
    folder = folder or shipped.FOLDER
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"demo: {folder} must hold a model; python -m latro.demo.base --out FOLDER makes one")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def config_of(folder: Path, seed: int) -> LatroConfig:
    return LatroConfig(
        output_dir=str(folder),
        seed=seed,
        preset="code",  # the answer's own likelihood is not trained: the gain is all of reasoning
        truncation_penalty=0.0,
        max_steps=UPDATES,
        per_device_train_batch_size=PROMPTS,
        num_generations=K,
        max_completion_length=2 * (2 * task.STEPS + 1),
        learning_rate=LEARNING_RATE,
        answer_template=task.ANSWER_TEMPLATE,
        stop_strings=[task.MARKER],
        separator="",
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=20,
        eval_on_start=True,
        save_strategy="no",
        use_cpu=True,
    )


def prepare_folder(folder: Path) -> None:
    """A demo begins anew, but only where what is there is a demo's."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "metrics.jsonl").is_file():
            raise FileExistsError(f"demo: {folder} holds other things; name an empty folder by --output_dir")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def ask(model: PreTrainedModel, text: Text, questions: Sequence[Example], what: str) -> Evaluation:
    tokens = 2 * (2 * task.STEPS + 1)
    with tqdm(total=len(questions) * (1 + VOTES), desc=what, unit="answer", leave=False) as bar:
        return evaluate(
            model,
            text,
            questions,
            graders=graders_for("", task.ANSWER_TEMPLATE),
            max_tokens=tokens,
            majority=VOTES,
            batch_size=1024,
            progress=bar.update,
        )


def fine_tune_on_answers(model: PreTrainedModel, text: Text, train: Sequence[Example]) -> PreTrainedModel:
    """As many updates on the same prompts and answers, without rationales, at the same learning rate."""
    tree_model, none = TreeModel(model), text.rationale([])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, UPDATES)
    objective = SelfReward(beta=0.0, answer_weight=1.0)
    for update in tqdm(range(UPDATES), desc="fine-tuning on answers", unit="update", leave=False):
        examples = train[update * PROMPTS : (update + 1) * PROMPTS]
        tree, scored = pack_rationales(
            [text.prompt(example.prompt) for example in examples],
            [[[]] for _ in examples],
            [text.answer(none, example.answer) for example in examples],
        )
        loss = tree_model(tree, scored, objective=objective, advantage=torch.zeros(len(examples))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


def summary(evaluation: Evaluation) -> dict[str, Any]:
    metrics = evaluation.metrics()
    return {
        "accuracy": metrics["accuracy"],
        "interval": [metrics["accuracy_low"], metrics["accuracy_high"]],
        "n": metrics["n"],
        "sample_accuracy": metrics["sample_accuracy"],
        "majority": metrics[f"majority@{VOTES}"],
        "rationale_length": metrics["rationale_length"],
    }


def shown_options(config: LatroConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in LatroConfig.__annotations__}


def show(before: Evaluation, sft: Evaluation, after: Evaluation, differences: dict[str, Comparison]) -> None:
    print(f"\nOf {len(before.records)} questions of a test split, which chose nothing, right are (95 % interval)\n")
    print(f"{'':<28}{'greedy':<26}{'sampled':<10}vote of {VOTES}")
    for name, evaluation in (("before", before), ("fine-tuned on answers", sft), ("after LaTRO", after)):
        found = summary(evaluation)
        low, high = found["interval"]
        greedy = f"{found['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        print(f"{name:<28}{greedy:<26}{found['sample_accuracy']:<10.1%}{found['majority']:.1%}")
    for name, one in (("LaTRO's gain", differences["gain"]), ("its lead over fine-tuning", differences["over_sft"])):
        print(f"{name:<28}{one.difference:+.1%} ({one.low:+.1%} to {one.high:+.1%})")
    print(f"\n{'question':<20}{'answer':<9}{'before':<14}{'fine-tuned':<14}after LaTRO")
    for first, second, last in list(zip(before.records, sft.records, after.records, strict=True))[:SHOWN]:
        said = f"{first.greedy.text:<14}{second.greedy.text:<14}{last.greedy.text}"
        print(f"{first.prompt:<20}{first.answer:<9}{said}")
