"""Checkpoints that are whole or not there, whenever the process dies, and that hold the model without its wrapper.

transformers writes `checkpoint-N` in place and resumes from the highest N, even half written. Here a checkpoint is
written into a folder aside, with a list of its files, synced to the disk, and renamed; one is resumed from only if all
that it lists is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

# A folder of the run's, of which nothing is ever read. The Hub is sent no names that begin so.
UNFINISHED = "_unfinished"
REPLACED = ".replaced"  # behind the name of a checkpoint while another one takes it
FILES = "files.json"  # of a checkpoint, with their sizes


class WholeCheckpoints(Trainer):
    """A Trainer of a TreeModel whose checkpoints hold the language model itself, in safetensors."""

    _aside: Path | None = None

    @property
    def language_model(self) -> Any:
        """What is saved: a model of transformers, or of PEFT."""
        return self.accelerator.unwrap_model(self.model).model

    def save_more(self, checkpoint: Path) -> None:
        """For what a subclass has to find again. Every process calls it."""

    # Writing

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._written_aside(checkpoint) as folder:
            super()._save_checkpoint(model, trial)
            self.save_more(folder)
            self._find_best(checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                publish(folder, checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @contextmanager
    def _written_aside(self, checkpoint: Path) -> Iterator[Path]:
        aside = checkpoint.parent / UNFINISHED
        try:
            if self.args.should_save and aside.exists():
                shutil.rmtree(aside)
            self.accelerator.wait_for_everyone()
            self._aside = aside
            (aside / checkpoint.name).mkdir(parents=True, exist_ok=True)
            yield aside / checkpoint.name
        except (OSError, RuntimeError, SafetensorError) as error:  # the last two are how writers tell of a full disk
            raise OSError(
                f"{checkpoint} could not be written: {error}; {free_space(checkpoint.parent)}; "
                f"the newest whole checkpoint is {newest(checkpoint.parent)}"
            ) from error
        finally:
            self._aside = None
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _find_best(self, checkpoint: Path) -> None:
        """As transformers does, which looked for it beside the checkpoint that is written."""
        best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == checkpoint or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else it is not whole yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model without its wrapper, and the tokenizer; no pickled arguments."""
        if not self.args.should_save:
            return
        folder, model = str(output_dir or self.args.output_dir), self.language_model
        if state_dict is not None:
            inner = self.accelerator.unwrap_model(self.model).model
            path = next(path for path, module in model.named_modules() if module is inner)
            prefix = path and f"{path}."  # under an adapter
            # Gathered, a tied weight is there under each of its names.
            tied = dict(inner.named_parameters(remove_duplicate=False)).keys() - dict(inner.named_parameters()).keys()
            names = {name: name.removeprefix("model.") for name in state_dict}
            state_dict = {prefix + own: state_dict[name] for name, own in names.items() if own not in tied}
        model.save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        wrapped, self.model = self.model, self.language_model  # PEFT's writes a card of its own
        try:
            super().create_model_card(*args, **options)
        finally:
            self.model = wrapped

    # Reading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif isinstance(self.language_model, PreTrainedModel):
            load_weights(self.language_model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, self.language_model)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Exactly what save_pretrained wrote.

    It writes the names and the tensors of the published model, which may not be those in memory: a mixture's experts
    are one tensor there. Trainer's own way leaves such weights as they are.
    """
    saved = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    own = model.state_dict(keep_vars=True)
    found = {id(own[name]) for name in saved.keys() & own.keys()}  # tied ones are one object, and are saved once
    if saved.keys() <= own.keys() and all(id(tensor) in found for tensor in own.values()):
        model.load_state_dict(saved, strict=False)
        return
    kind: Any = type(model)
    widest = reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    other, info = kind.from_pretrained(folder, config=model.config, dtype=widest, output_loading_info=True)
    unlike = {what: sorted(names) for what, names in info.items() if names}
    if unlike:
        raise ValueError(f"{folder} must hold the weights of a {kind.__name__} like this one, got {unlike}")
    model.load_state_dict(other.state_dict())


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder."""
    found = {}
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)({re.escape(REPLACED)})?", folder.name)
        if match and is_whole(folder):
            found[int(match[1]), match[2] is None] = folder
    return found[max(found)] if found else None


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there in full: a removal or a copy of it may have been cut short."""
    files = checkpoint / FILES
    try:
        sizes = json.loads(files.read_text()) if files.is_file() else {}
    except ValueError:  # it is cut short itself
        return False
    return bool(sizes) and all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )


def publish(folder: Path, checkpoint: Path) -> None:
    """Give a written checkpoint its name, once it is on the disk. There is one of the name at any moment after."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    (folder / FILES).write_text(json.dumps(sizes, indent=1))
    sync(folder)
    replaced = checkpoint.with_name(checkpoint.name + REPLACED)
    if checkpoint.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(checkpoint, replaced)
    os.replace(folder, checkpoint)
    sync_folder(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync(folder: Path) -> None:
    """All of the folder is on the disk when this returns."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_space(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there"
