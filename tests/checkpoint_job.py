"""Trains a tiny model in processes that may die: one process imports everything, and forks for every job.

Jobs come as lines of JSON. For each there is a line when its training begins, with its process, and one when it ended.
A job goes on from its folder's newest checkpoint, and leaves in `end.pt` what training ended with.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from latro.checkpoint import newest
from latro.config import LatroConfig
from latro.trainer import LatroTrainer
from tests.tiny import character_tokenizer, examples, tiny_llama


def trainer_of(folder, model=None, config=None, **options):
    """Its rationales are the model's own, which learns fast enough that each update changes them."""
    tokenizer = character_tokenizer()
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_generations": 3,
        "max_completion_length": 6,
        "max_steps": 12,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "completions_every": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        **(config or {}),
    }
    return LatroTrainer(
        tiny_llama(tokenizer) if model is None else model,
        LatroConfig(**settings),
        examples(),
        processing_class=tokenizer,
        **options,
    )


class Moments:
    """Counts the calls of functions in training, and of them those that write checkpoints. It may die at one."""

    def __init__(self, trainer, within="training", at=None, by="SIGKILL"):
        self.counts = {"training": 0, "saving": 0}
        self.within, self.at, self.by, self.is_saving = within, at, signal.Signals[by], False
        train, save = trainer.train, trainer._save_checkpoint

        def counted_train(*args, **options):
            sys.setprofile(self)
            train(*args, **options)
            sys.setprofile(None)

        def counted_save(*args, **options):
            self.is_saving = True
            save(*args, **options)
            self.is_saving = False

        trainer.train, trainer._save_checkpoint = counted_train, counted_save

    def __call__(self, frame, event, function):
        self.counts["training"] += 1
        self.counts["saving"] += self.is_saving
        if self.counts[self.within] == self.at:
            os.kill(os.getpid(), self.by)


def fill_disk(trainer, at_save, size):
    """From that save on, no file can grow beyond so many bytes."""
    saves, save = [], trainer._save_checkpoint

    def limited(*args, **options):
        saves.append(1)
        if len(saves) == at_save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        save(*args, **options)

    trainer._save_checkpoint = limited


def run(job, began):
    folder = Path(job["folder"])
    trainer = trainer_of(folder, config=job.get("config"))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, JITCheckpointCallback):
            callback.jit_manager.kill_wait = 0
    moments = Moments(trainer, **job["moments"]) if "moments" in job else None
    if "full" in job:
        fill_disk(trainer, **job["full"])
    found = newest(folder)
    os.write(began, json.dumps({"began": os.getpid()}).encode() + b"\n")
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    end = {
        "weights": trainer.language_model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "moments": moments and moments.counts,
    }
    torch.save(end, folder / "end.pt")


def in_a_fork(job):
    began = os.dup(sys.stdout.fileno())
    child = os.fork()
    if child:
        os.close(began)
        return os.waitpid(child, 0)[1]
    log = os.open(Path(job["folder"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run(job, began)
    except BaseException:  # what the parent cleans up on its way out is not the child's
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forks: one that is killed may hold it for ever
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(character_tokenizer()).save_pretrained(folder)  # what is made only once, a second's worth
    for line in sys.stdin:
        status = in_a_fork(json.loads(line))
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)
