"""The command `latro`: train, eval, sample, explore, self-explore, report, demo, study, plan."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from latro.config import LatroConfig
from latro.plan.options import add_arguments as add_plan_arguments

DESCRIPTION = """Teach a language model to reason from gold answers alone (LaTRO, arXiv 2411.04282).

  latro demo                                   watch it work, in three minutes, with nothing to download
  latro train --model M --dataset gsm8k        train; checkpoints and figures go to --output_dir
  latro eval M [OTHER] --dataset gsm8k         accuracy with intervals; of two models, their paired difference
  latro sample M --dataset gsm8k               rationales of a prompt side by side, with their rewards
  latro explore M --dataset gsm8k              where rationales go wrong, step by step
  latro self-explore --model M --dataset gsm8k    train on that (Self-Explore, arXiv 2404.10346)
  latro report RUN                             a page with a run's curves and rationales
  latro study --quick                          methods against each other on small tasks; the figures of docs/study.md
  latro plan --model llama-3.1-8b --gpus 64    memory and time of an update on paper, and which layouts fit
"""

TRAIN = """Train a model by LaTRO. Any option may stand in a YAML file as well, by the same name; a flag counts more.

  latro train --model Qwen/Qwen3-0.6B --dataset gsm8k --output_dir runs/gsm8k --max_steps 200
  latro train --config run.yaml --resume true
  torchrun --nproc-per-node 8 -m latro train --config run.yaml
"""

SELF_EXPLORE = """Self-Explore (arXiv 2404.10346), whole: fine-tuning on golden rationales, rejection sampling,
exploration of wrong rationales step by step, DPO on the first wrong steps. Any option may stand in a YAML file too.

  latro self-explore --model Qwen/Qwen3-0.6B --dataset gsm8k --output_dir runs/explored --learning_rate 1e-5
  latro self-explore --config run.yaml --dpo.learning_rate 1e-7 --resume true

Options of latro train are options of each training here, and of one of them with sft., rft. or dpo. before the name.
Those of dpo are by default the paper's: 3 epochs of RMSprop, warm-up 0.1, learning_rate 1e-6, beta 0.1.
"""

THEIRS = """Those of transformers' TrainingArguments (max_steps, gradient_accumulation_steps, bf16, eval_strategy,
report_to, fsdp, deepspeed, …) are options too: https://huggingface.co/docs/transformers/main_classes/trainer
"""


# A small task has its own, where they are not given.
TEXT_OPTIONS = ("answer_template", "separator", "stop_strings", "max_completion_length")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class RunOptions:
    """What `latro train` needs beside LatroConfig."""

    model: str | None = _option(None, "a folder or a name of the hub")
    dataset: str | None = _option(
        None,
        "gsm8k, arc, csqa, hellaswag, math, svamp, humaneval, mbpp, a small task such as chain(steps=5), "
        "a file of JSON lines (prompt and completion, or question and answer), or a name of the hub; "
        "gsm8k and the others of its kind are read from the folder LATRO_DATA if it is set",
    )
    split: str = _option("train", "of the data set")
    prompt_template: str | None = _option(None, "with {question}, and {options} for arc; the paper's by default")
    limit: int | None = _option(None, "train on so many examples at most")
    validation: int = _option(0, "hold about so many examples out of training, for evaluation (see eval_strategy)")
    lora: int | None = _option(None, "train an adapter of this rank (needs the package peft)")
    resume: bool = _option(False, "go on from the newest checkpoint of output_dir, where there is one")


@dataclass
class SelfExploreOptions:
    """What `latro self-explore` needs beside a LatroConfig for each training."""

    model: str | None = _option(None, "the base: a folder or a name of the hub")
    dataset: str | None = _option(None, "with golden rationales; as of latro train")
    output_dir: str | None = _option(None, "a folder for each training's model, and for what was sampled")
    split: str = _option("train", "of the data set")
    prompt_template: str | None = _option(None, "with {question}, and {options} for arc; the paper's by default")
    limit: int | None = _option(None, "so many problems at most")
    golden: int | None = _option(None, "imitate golden rationales of so many of them only")
    test_dataset: str | None = _option(
        None, "on which each stage is measured; the data set's own test split by default"
    )
    test_limit: int = _option(500, "questions of it at most; 0: measure nothing")
    samples: int = _option(100, "of each problem, for rejection sampling")
    kept: int = _option(8, "right samples of each problem that are imitated, at most")
    continuations: int = _option(4, "sampled after each step of a wrong rationale")
    most_steps: int = _option(20, "of a rationale that are explored")
    temperature: float = _option(0.7, "of all sampling")
    also_dpo: bool = _option(False, "train on whole pairs too, for comparison")
    resume: bool = _option(False, "go on from what output_dir has")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:
            return _train(arguments[1:])
        if arguments[:1] == ["self-explore"]:
            return _self_explore(arguments[1:])
        known = _parser().parse_args(arguments)
        known.command(known)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"latro: {error}", file=sys.stderr)
        return 1
    return 0


def _train(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(train_help())
        return 0
    from latro.launch import leave_process_group, train

    run, config = train_options(arguments)
    train(run, config)
    leave_process_group()
    return 0


def _self_explore(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print("\n".join([SELF_EXPLORE, "options:", *_option_lines(SelfExploreOptions)]))
        return 0
    from latro.explore import command

    command.run(*self_explore_options(arguments))
    return 0


def self_explore_options(arguments: list[str]) -> tuple[SelfExploreOptions, dict[str, LatroConfig]]:
    """The pipeline's own options, and the configuration of each training."""
    from latro.explore import command, pipeline

    parser: Any = HfArgumentParser(SelfExploreOptions, prog="latro self-explore", allow_abbrev=False)  # type: ignore[arg-type]
    options, others = parser.parse_args_into_dataclasses(_with_file(arguments), return_remaining_strings=True)
    common = _as_flags(command.text_options(options.dataset or ""))
    own: dict[str, list[str]] = {"sft": [], "rft": [], "dpo": _as_flags(pipeline.PAPER)}
    flags = common
    for part in others:
        name, dot, option = part.removeprefix("--").partition(".")
        if part.startswith("--"):
            flags = own[name] if dot and name in own else common
            part = f"--{option}" if flags is not common else part
        flags.append(part)
    configs = {}
    for name, objective in pipeline.TRAININGS.items():
        if name == "dpo" and not options.also_dpo:
            continue
        folder = str(Path(options.output_dir or "", name))
        flags = common + own.get(name, own["dpo"]) + ["--objective", objective, "--output_dir", folder]
        parser = HfArgumentParser(LatroConfig, prog="latro self-explore", allow_abbrev=False)  # type: ignore[arg-type]
        configs[name], unknown = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
        if unknown:
            raise ValueError(f"self-explore: there is no option {unknown[0]}; see latro self-explore --help")
    return options, configs


def train_options(arguments: list[str]) -> tuple[RunOptions, LatroConfig]:
    """Options of a YAML file, if --config names one, and flags, which count more."""
    records: Any = [RunOptions, LatroConfig]
    parser: Any = HfArgumentParser(records, prog="latro train", allow_abbrev=False)
    run, config, unknown = parser.parse_args_into_dataclasses(_with_file(arguments), return_remaining_strings=True)
    if unknown:
        raise ValueError(f"train: there is no option {unknown[0]}; see latro train --help")
    return run, config


def _with_file(arguments: list[str]) -> list[str]:
    """Those of the file that --config names, and then the others."""
    of_file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    of_file.add_argument("--config", type=Path)
    known, flags = of_file.parse_known_args(arguments)
    return ([] if known.config is None else _flags(known.config)) + flags


def _flags(path: Path) -> list[str]:
    """What the file says, as flags."""
    try:
        options = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: must hold options, one 'name: value' per line, got {type(options).__name__}")
    return _as_flags(options)


def _as_flags(options: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return flags


def train_help() -> str:
    return "\n".join([TRAIN, "options:", *_option_lines(RunOptions, LatroConfig), "", THEIRS])


def _option_lines(*records: Any) -> list[str]:
    lines = []
    for record in records:
        for option in fields(record):
            if option.name not in record.__annotations__:
                continue
            default = option.default if option.default_factory is MISSING else option.default_factory()
            shown = "" if default is None else f" [{default}]"
            text = textwrap.wrap(option.metadata["help"] + shown, 84)
            lines += [f"  --{option.name:<28}" + text[0], *(" " * 32 + rest for rest in text[1:])]
    return lines


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("latro", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a model")
    commands.add_parser("self-explore", help="train a model by Self-Explore, the whole pipeline")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help + ".")
        added.set_defaults(command=lambda known: _call(name, known))
        return added

    of_eval = command("eval", "how often a model is right, or how two models differ on the same questions")
    of_eval.add_argument("model", help="a folder or a name of the hub")
    of_eval.add_argument("other", nargs="?", help="a second model, to compare")
    _add_data(of_eval, "test", None)
    of_eval.add_argument(
        "--majority", type=int, default=0, metavar="K", help="samples per question, for majority votes"
    )
    of_eval.add_argument("--json", type=Path, help="write figures and completions here")

    of_sample = command("sample", "rationales of a prompt side by side, with their rewards")
    of_sample.add_argument("model", help="a folder or a name of the hub")
    _add_data(of_sample, "train", 1)
    of_sample.add_argument("--num_generations", type=int, default=4, metavar="K", help="rationales of each prompt [4]")

    of_explore = command("explore", "where rationales go wrong: how often the model is right from each of their steps")
    of_explore.add_argument("model", help="a folder or a name of the hub")
    _add_data(of_explore, "train", 3)
    of_explore.add_argument("--num_generations", type=int, default=4, metavar="K", help="rationales of each prompt [4]")
    of_explore.add_argument("--continuations", type=int, default=4, help="sampled after each step [4]")
    of_explore.add_argument("--all", action="store_true", help="explore rationales with the right answer too")
    of_explore.add_argument("--to", type=Path, help="write a page with pictures here")
    of_explore.set_defaults(temperature=0.7, **dict.fromkeys(TEXT_OPTIONS))

    of_report = command("report", "a page with a run's curves and rationales")
    of_report.add_argument("run", type=Path, help="the output_dir of latro train")
    of_report.add_argument("--to", type=Path, help="where the page goes [RUN/report.html]")

    of_demo = command("demo", "LaTRO teaching a tiny model to reason, with nothing to download")
    of_demo.add_argument("--output_dir", type=Path, default=Path("latro-demo"), help="[latro-demo]")
    of_demo.add_argument("--seed", type=int, default=0, help="of sampling and the order of the data [0]")
    of_demo.add_argument("--base", type=Path, help="another base, as python -m latro.demo.base makes them")
    of_demo.add_argument("--json", type=Path, help="write the figures here")

    of_study = command("study", "methods against each other on small tasks, from several bases and seeds")
    of_study.add_argument("--output_dir", type=Path, default=Path("latro-study"), help="what is there is not run again")
    of_study.add_argument("--document", type=Path, help="write tables and figures of what was run into this page")
    of_study.add_argument("--report", action="store_true", help="run nothing: of what is there already")
    of_study.add_argument("--quick", action="store_true", help="a few models, of which the signs are checked")
    of_study.add_argument(
        "--experiments", nargs="+", help="of methods, recipes, stability, lengths, feedback, explore, sizes"
    )
    of_study.add_argument("--tasks", nargs="+", help="of those that have recipes of bases")
    of_study.add_argument("--sizes", nargs="+", help="models of the experiment sizes, such as 0.15M and 5M")
    of_study.add_argument("--seeds", type=int, help="each of which has bases, prompts and questions of its own")
    of_study.add_argument("--processes", type=int, default=os.cpu_count(), help="models trained at once [all cores]")

    of_plan = command("plan", "memory and time of an update on paper: what fits, what binds, what a rationale costs")
    add_plan_arguments(of_plan)
    return parser


def _add_data(parser: argparse.ArgumentParser, split: str, limit: int | None) -> None:
    defaults = LatroConfig.__dataclass_fields__
    parser.add_argument("--dataset", required=True, help="as of latro train")
    parser.add_argument("--split", default=split, help=f"of the data set [{split}]")
    parser.add_argument("--limit", type=int, default=limit, help=f"questions at most [{limit or 'all'}]")
    parser.add_argument("--prompt_template", help="with {question}, and {options} for arc; the paper's by default")
    parser.add_argument("--max_completion_length", type=int, default=500, help="tokens [500]")
    parser.add_argument("--temperature", type=float, default=1.0, help="of samples [1.0]")
    parser.add_argument("--seed", type=int, default=0, help="of samples [0]")
    for name in ("answer_template", "separator"):
        parser.add_argument(f"--{name}", default=defaults[name].default, help=defaults[name].metadata["help"])
    parser.add_argument("--stop_strings", nargs="*", default=["The answer is"], help="where a rationale ends")


def _call(name: str, known: argparse.Namespace) -> None:
    from latro import launch

    getattr(launch, name)(known)


if __name__ == "__main__":
    sys.exit(main())
