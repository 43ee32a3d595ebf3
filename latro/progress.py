"""What a person sees of a run: a bar for the updates, one for the rollouts of each, and lines of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

if TYPE_CHECKING:
    from latro.trainer import LatroTrainer

# What is printed of an update: a name for people, the metric, how it is written.
LINE = [
    ("reward", "reward", "{:.3f}"),
    ("±", "reward_std", "{:.3f}"),
    ("answer", "answer_logp", "{:.3f}"),
    ("kl", "kl", "{:.3f}"),
    ("length", "rationale_length", "{:.1f}"),
    ("cut off", "truncated_frac", "{:.0%}"),
    ("grad", "grad_norm", "{:.2f}"),
    ("lr", "learning_rate", "{:.1e}"),
]


class Progress(TrainerCallback):
    """In place of transformers' own, which prints dictionaries."""

    def __init__(self, quiet: bool | None) -> None:
        self.quiet = bool(quiet)  # no bars
        self.updates: Any = None  # the bar

    @staticmethod
    def take_over(trainer: LatroTrainer) -> None:
        for theirs in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(theirs)
        trainer.add_callback(Progress(trainer.args.disable_tqdm))

    @staticmethod
    @contextmanager
    def bar(trainer: LatroTrainer, count: int, what: str) -> Iterator[Callable[[int], object]]:
        """Of what is sampled, below that of the updates."""
        hidden = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        with tqdm(total=count, desc=what, unit="sample", leave=False, disable=hidden) as bar:
            yield bar.update

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_local_process_zero and not self.quiet:
            self.updates = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="update")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.updates is not None:
            self.updates.update(state.global_step - self.updates.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            line = metrics_line(state.global_step, state.max_steps, logs)
            if line:
                tqdm.write(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.updates is not None:
            self.updates.close()
            self.updates = None


def metrics_line(step: int, steps: int, logs: dict[str, Any]) -> str:
    """Of an update the figures of LINE, of an evaluation all of them with their intervals."""
    parts = [f"{name} {form.format(logs[metric])}" for name, metric, form in LINE if metric in logs]
    if not parts:
        parts = [
            f"{name} {value:.3f}{_interval(name, logs)}"
            for name, value in logs.items()
            if name.startswith("eval_") and isinstance(value, float) and not name.endswith(("_low", "_high"))
        ]
    return f"update {step}/{steps}  " + "  ".join(parts) if parts else ""


def _interval(name: str, logs: dict[str, Any]) -> str:
    low, high = logs.get(f"{name}_low"), logs.get(f"{name}_high")
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
