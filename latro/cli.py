"""The command `latro`: train, eval, sample, report, demo."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from latro.config import LatroConfig

DESCRIPTION = """Teach a language model to reason from gold answers alone (LaTRO, arXiv 2411.04282).

  latro demo                                   watch it work, in three minutes, with nothing to download
  latro train --model M --dataset gsm8k        train; checkpoints and figures go to --output_dir
  latro eval M [OTHER] --dataset gsm8k         accuracy with intervals; of two models, their paired difference
  latro sample M --dataset gsm8k               rationales of a prompt side by side, with their rewards
  latro report RUN                             a page with a run's curves and rationales
"""

TRAIN = """Train a model by LaTRO. Any option may stand in a YAML file as well, by the same name; a flag counts more.

  latro train --model Qwen/Qwen3-0.6B --dataset gsm8k --output_dir runs/gsm8k --max_steps 200
  latro train --config run.yaml --resume true
  torchrun --nproc-per-node 8 -m latro train --config run.yaml
"""

THEIRS = """Those of transformers' TrainingArguments (max_steps, gradient_accumulation_steps, bf16, eval_strategy,
report_to, fsdp, deepspeed, …) are options too: https://huggingface.co/docs/transformers/main_classes/trainer
"""


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


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:
            return _train(arguments[1:])
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
    from latro.launch import train

    run, config = train_options(arguments)
    train(run, config)
    return 0


def train_options(arguments: list[str]) -> tuple[RunOptions, LatroConfig]:
    """Options of a YAML file, if --config names one, and flags, which count more."""
    of_file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    of_file.add_argument("--config", type=Path)
    known, flags = of_file.parse_known_args(arguments)
    records: Any = [RunOptions, LatroConfig]
    parser: Any = HfArgumentParser(records, prog="latro train", allow_abbrev=False)
    given = ([] if known.config is None else _flags(known.config)) + flags
    run, config, unknown = parser.parse_args_into_dataclasses(given, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"train: there is no option {unknown[0]}; see latro train --help")
    return run, config


def _flags(path: Path) -> list[str]:
    """What the file says, as flags."""
    try:
        options = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: must hold options, one 'name: value' per line, got {type(options).__name__}")
    flags = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
    return flags


def train_help() -> str:
    lines = [TRAIN, "options:"]
    for record in (RunOptions, LatroConfig):
        for option in fields(record):
            if option.name not in record.__annotations__:
                continue
            default = option.default if option.default_factory is MISSING else option.default_factory()
            shown = "" if default is None else f" [{default}]"
            text = textwrap.wrap(option.metadata["help"] + shown, 84)
            lines += [f"  --{option.name:<28}" + text[0], *(" " * 32 + rest for rest in text[1:])]
    return "\n".join([*lines, "", THEIRS])


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("latro", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a model")

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

    of_report = command("report", "a page with a run's curves and rationales")
    of_report.add_argument("run", type=Path, help="the output_dir of latro train")
    of_report.add_argument("--to", type=Path, help="where the page goes [RUN/report.html]")

    of_demo = command("demo", "LaTRO teaching a tiny model to reason, with nothing to download")
    of_demo.add_argument("--output_dir", type=Path, default=Path("latro-demo"), help="[latro-demo]")
    of_demo.add_argument("--seed", type=int, default=0, help="of sampling and the order of the data [0]")
    of_demo.add_argument("--base", type=Path, help="another base, as python -m latro.demo.base makes them")
    of_demo.add_argument("--json", type=Path, help="write the figures here")
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
