"""Python that a model wrote, run in a process that can do little harm.

    run("assert 1 + 1 == 3").passed        # False; .reason is "AssertionError"

On any Unix: an end to its time, memory, output and the size of a file, an empty temporary folder, no environment
variables. On Linux also, by Landlock and seccomp, which need no privileges: no network, no other process or thread, no
signals, nothing changed outside its folder, nothing executed. `unguarded` says what of it this system lacks. It may
read what its user may read; what it makes of that goes no further than `Outcome.output`.

A program passes where it runs to its end: neither an early exit nor anything printed counts. This stops accidents and
easy tricks. Against one who attacks Python itself from within, use a machine of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import IO

CHILD = Path(__file__).with_name("sandboxed.py")
CHUNK = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    memory: int = 1 << 30  # bytes, of addresses
    output: int = 1 << 16  # bytes
    file: int = 1 << 20  # bytes of each


@dataclass(frozen=True)
class Outcome:
    """How a program ended. reason: why it did not pass. unguarded: what this system could not keep it from."""

    passed: bool
    reason: str
    output: str
    unguarded: tuple[str, ...]


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a program to its end, or to one of its limits."""
    limits = limits or Limits()
    token = secrets.token_hex(16)
    hard = {
        "RLIMIT_CPU": ceil(limits.seconds) + 1,  # beside the clock, should this process die first
        "RLIMIT_AS": limits.memory,
        "RLIMIT_FSIZE": limits.file,
        "RLIMIT_NPROC": 0,  # which does not bind root
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
    }
    ours, theirs = os.pipe()
    with (
        open(ours, "rb") as report,
        tempfile.TemporaryDirectory(prefix="latro-") as folder,
        tempfile.TemporaryFile() as source,
    ):
        source.write(program.encode(errors="replace"))
        source.seek(0)
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-B", str(CHILD), str(theirs), token, json.dumps(hard)],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                pass_fds=[theirs],
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        with child:
            assert child.stdout is not None
            try:
                output, reported, broken = _read(child.stdout, report, limits)
            finally:
                os.killpg(child.pid, signal.SIGKILL)  # its number is its own until it is waited for
    unguarded, _, said = reported.decode(errors="replace").partition("\n")
    text = output.decode(errors="replace")
    passed = not broken and said == token
    reason = "" if passed else broken or _last_line(text) or f"ended by itself, with status {child.returncode}"
    return Outcome(passed, reason, text, tuple(json.loads(unguarded or "[]")))


@cache
def unguarded() -> tuple[str, ...]:
    """What programs are not kept from on this system: of files, network and processes."""
    return run("").unguarded


def _read(output: IO[bytes], report: IO[bytes], limits: Limits) -> tuple[bytes, bytes, str]:
    """What a program wrote to both until it ended, and the limit that it broke, if any."""
    until, found = time.monotonic() + limits.seconds, {output.fileno(): b"", report.fileno(): b""}
    broken = ""
    with selectors.DefaultSelector() as selector:
        for pipe in found:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and not broken:
            ready = selector.select(max(0.0, until - time.monotonic()))
            for key, _ in ready:
                chunk = os.read(key.fd, CHUNK)
                found[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                elif len(found[key.fd]) > limits.output:
                    broken = f"wrote more than {limits.output} bytes"
            if not ready or time.monotonic() > until:
                broken = broken or f"took longer than {limits.seconds:g} s"
    return found[output.fileno()][: limits.output], found[report.fileno()], broken


def _last_line(text: str) -> str:
    """What a traceback ends with."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
