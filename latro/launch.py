"""What the commands do, once their options are read."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import latro_kernels
from latro import data
from latro.checkpoint import newest
from latro.config import LatroConfig
from latro.evaluate import Evaluation, compare, split_off
from latro.evaluate import evaluate as evaluate_model
from latro.grading import graders_for
from latro.metrics import RunLog
from latro.model import TreeModel
from latro.rollout import LocalEngine, Sampling, sample_key
from latro.score import answer_logps, path_of
from latro.text import Text, end_of_answer, end_tokens

SAMPLE_WIDTH = 44  # characters of a column


def load_model(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer


def train(run: Any, config: LatroConfig) -> None:
    for name in ("model", "dataset"):
        if not getattr(run, name):
            raise ValueError(f"train: --{name} must be given; see latro train --help")
    from latro.trainer import LatroTrainer

    examples = data.load(run.dataset, run.split, prompt_template=run.prompt_template)[: run.limit]
    held_out = None
    if run.validation:
        examples, held_out = split_off(examples, run.validation / len(examples), config.seed)
    folder = Path(str(config.output_dir))
    checkpoint = newest(folder) if run.resume else None
    with loading_whole(config):
        model, tokenizer = load_model(run.model, dtype=torch.bfloat16 if config.bf16 and run.lora else torch.float32)
    if run.lora:
        model = with_adapter(model, run.lora)
    trainer = LatroTrainer(
        model,
        config,
        examples,
        held_out,
        tokenizer,
        graders=graders_for(run.dataset, config.answer_template, options=bool(examples[0].options), examples=examples),
    )
    if trainer.is_world_process_zero():
        RunLog(folder).describe(
            model=run.model, dataset=run.dataset, options=options_of(run, config), versions=versions()
        )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()


@contextmanager
def loading_whole(config: LatroConfig) -> Iterator[None]:
    """Under ZeRO-3 transformers shares a model out as it loads it, which the trainer does later."""
    plugin = config.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def leave_process_group() -> None:
    """Before the process exits, when nothing holds what was trained any more.

    A thread of gloo's may let go of the last tensors late, for which it needs the interpreter: torch 2.13 aborts the
    process if that ends meanwhile, or waits for ever if a wrapped model holds the group and is let go of later.
    """
    if dist.is_initialized():
        PartialState().wait_for_everyone()  # without the interpreter's lock, which that thread then gets
        PartialState().destroy_process_group()


def with_adapter(model: PreTrainedModel, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("train: --lora needs the package peft: pip install peft") from error
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapter)


def options_of(run: Any, config: LatroConfig) -> dict[str, Any]:
    """Those of the run, LaTRO's own, and of transformers' those that are not its defaults."""
    defaults = {option.name: option.default for option in fields(config)}
    own = LatroConfig.__annotations__
    shown = {name: value for name, value in config.to_dict().items() if name in own or value != defaults.get(name)}
    return {**asdict(run), **shown}


def versions() -> dict[str, str]:
    return {
        "latro": latro_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# eval


def eval(known: argparse.Namespace) -> None:
    examples = data.load(known.dataset, known.split, prompt_template=known.prompt_template)[: known.limit]
    found = [_evaluate(name, examples, known) for name in (known.model, known.other) if name is not None]
    for name, evaluation in zip((known.model, known.other), found, strict=False):
        print(f"\n{name}, {len(examples)} questions of {known.dataset} ({known.split})")
        print(table(evaluation.metrics()))
    result: dict[str, Any] = {
        name: evaluation.to_json() for name, evaluation in zip(("model", "other"), found, strict=False)
    }
    if len(found) == 2:
        differences = compare(*found)
        print(f"\n{known.other} less {known.model}, on the same questions (95 % interval)")
        for name, one in differences.items():
            print(f"  {name:<28} {one.difference:+.3f}  [{one.low:+.3f}, {one.high:+.3f}]  p = {one.p_value:.2g}")
        result["difference"] = {name: one._asdict() for name, one in differences.items()}
    if known.json is not None:
        known.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _evaluate(name: str, examples: Sequence[data.Example], known: argparse.Namespace) -> Evaluation:
    model, tokenizer = load_model(name)
    model.to(_device())  # type: ignore[arg-type]
    with tqdm(total=len(examples) * (1 + known.majority), desc=name, unit="completion", leave=False) as bar:
        return evaluate_model(
            model,
            _text(tokenizer, known),
            examples,
            graders=graders_for(
                known.dataset, known.answer_template, options=bool(examples[0].options), examples=examples
            ),
            max_tokens=known.max_completion_length,
            majority=known.majority,
            temperature=known.temperature,
            seed=known.seed,
            progress=bar.update,
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _text(tokenizer: PreTrainedTokenizerBase, known: argparse.Namespace) -> Text:
    return Text(
        tokenizer,
        answer_template=known.answer_template,
        separator=known.separator,
        stop_strings=known.stop_strings,
        end=end_of_answer(tokenizer),
    )


def table(metrics: dict[str, float]) -> str:
    """A line for each metric, with its interval where it has one."""
    lines = []
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
        lines.append(f"  {name:<28} {value:.3f}{interval}" if isinstance(value, float) else f"  {name:<28} {value}")
    return "\n".join(lines)


# sample


def sample(known: argparse.Namespace) -> None:
    examples = data.load(known.dataset, known.split, prompt_template=known.prompt_template)[: known.limit]
    model, tokenizer = load_model(known.model)
    model.to(_device())  # type: ignore[arg-type]
    text = _text(tokenizer, known)
    sampling = Sampling(
        max_tokens=known.max_completion_length,
        temperature=known.temperature,
        ends=end_tokens(tokenizer, model.generation_config),
        are_over=text.are_over,
    )
    prompts = [text.prompt(example.prompt) for example in examples]
    keys = [[sample_key(known.seed, "sample", e.id, k) for k in range(known.num_generations)] for e in examples]
    for example, prompt, samples in zip(
        examples, prompts, LocalEngine(model).generate(prompts, keys, sampling), strict=True
    ):
        rationales = [text.rationale(one.tokens) for one in samples]
        paths = [path_of(text, prompt, rationale, [example.answer]) for rationale in rationales]
        rewards = [logp for (logp,) in answer_logps(TreeModel(model), paths)]
        print(f"\n{text.decode(prompt)}\n=> {example.answer}\n")
        order = sorted(range(len(samples)), key=lambda k: -rewards[k])
        print(side_by_side([(f"log p(answer) {rewards[k]:.3f}", rationales[k].text) for k in order]))


def side_by_side(columns: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Texts below their headings, as many beside each other as the terminal has room for."""
    room = width or shutil.get_terminal_size((100, 24)).columns
    across = max(1, room // (SAMPLE_WIDTH + 2))
    blocks = []
    for first in range(0, len(columns), across):
        cells = [[heading, "-" * len(heading), *_wrapped(text)] for heading, text in columns[first : first + across]]
        height = max(map(len, cells))
        rows = zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
        blocks.append("\n".join("  ".join(part.ljust(SAMPLE_WIDTH) for part in row).rstrip() for row in rows))
    return "\n\n".join(blocks)


def _wrapped(text: str) -> list[str]:
    lines = [textwrap.wrap(line, SAMPLE_WIDTH) or [""] for line in text.splitlines()]
    return [part for line in lines for part in line]


def explore(known: argparse.Namespace) -> None:
    from latro.explore import command

    command.show(known)


def report(known: argparse.Namespace) -> None:
    from latro.report import report as write

    print(write(known.run, known.to))


def demo(known: argparse.Namespace) -> None:
    from latro.demo.run import run

    run(known.output_dir, seed=known.seed, base=known.base, json_file=known.json)


def study(known: argparse.Namespace) -> None:
    from latro.study import command

    if known.quick:
        folder, seeds = known.output_dir / "quick", known.seeds or command.QUICK_SEEDS
        wrong = command.quick(folder, seeds=seeds, processes=known.processes)
        print("\n".join(f"not so: {sign}" for sign in wrong) or "every sign is as it should be")
        if wrong:
            raise ValueError(f"study: {len(wrong)} signs are not as they should be; {folder} has the results")
        return
    found = command.run(
        known.output_dir, known.experiments, known.tasks, known.seeds, known.sizes, known.processes, known.report
    )
    print(command.shown(found))
    if known.document is not None:
        for path in command.write(known.document, found):
            print(f"written: {path}")


def plan(known: argparse.Namespace) -> None:
    from latro.plan import command

    command.plan(known)
