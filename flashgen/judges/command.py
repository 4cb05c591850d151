"""A judge that is any program: pictures and prompts.jsonl in, one JSON object out. The contract is in docs/judges.md."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flashgen.artifact.files import sha256
from flashgen.errors import NumericsError, UsageError
from flashgen.judges.base import Drawn, Judge, Judgement

CONTRACT = 'print one JSON object, as in {"overall": 0.5}; see docs/judges.md'
MAX_ANSWER_BYTES, MAX_LOG_BYTES = 4 << 20, 256 << 20  # of stdout and stderr
WAIT_S = 0.05  # between two looks at the size of the output


class CommandJudge(Judge):
    """Numbers that the program in `command` (`PROGRAM ARGS`, split as a shell splits, run without one) prints for a folder of pictures.

    PROGRAM is a file, relative to the folder where flashgen was started, or a name in PATH. The program runs in an empty temporary folder;
    arguments that name files or folders are passed as absolute paths, and the folder of the pictures is added as the last argument. After
    `timeout_s` seconds the program is stopped. `metric` is the program's name without its suffix and `higher_is_better` is true until the
    first answer, which may say otherwise; later answers must agree with the first one.

    Raises UsageError for a program that is not there.
    """

    def __init__(self, command: str, timeout_s: float = 3600.0) -> None:
        self.command, self.timeout_s = command, timeout_s
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"{self} cannot be split into words ({error}); close the quotes") from error
        if not words:
            raise UsageError(f"{self} names no program; write command:PROGRAM ARGS, as in command:./score.py")
        program = Path(words[0]).absolute() if Path(words[0]).is_file() else shutil.which(words[0])
        if program is None:
            raise UsageError(f"{self}: {words[0]} is no file and no program in PATH; name the program's file, as in command:./score.py")
        if not os.access(program, os.X_OK):
            raise UsageError(
                f"{self}: {words[0]} cannot be executed; chmod +x {words[0]}, or name its interpreter: command:python {words[0]}"
            )
        self.files = [word for word in words if Path(word).is_file()]
        self.words = [str(program), *(str(Path(word).absolute()) if Path(word).exists() else word for word in words[1:])]
        named = self.files[0] if self.files else words[0]
        self.metric = Path(named).stem
        self._is_answered = False

    def __str__(self) -> str:
        """The judge's SPEC, for messages."""
        return f"command:{self.command}"

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {word: sha256(Path(word)) for word in self.files}

    def identity(self) -> dict[str, Any]:
        """The command as typed, and sha256 digests of the program and of the arguments that are files. The metric's name is not part."""
        return {"judge": str(self), "files": self._digests}

    def judge(self, drawn: Drawn) -> Judgement:
        """Run the program on `drawn`.

        Raises NumericsError for numbers that are not finite, and UsageError for a program that fails, hangs, prints too much, or breaks
        the contract; messages end with the last line that the program wrote to stderr.
        """
        if not len(drawn.pictures):
            raise UsageError(f"{self} got no pictures to judge; draw at least one")
        with tempfile.TemporaryDirectory(prefix="flashgen-judge-") as name:
            folder = Path(name)
            _write(drawn, folder / "pictures")
            stdout, said = self._run(folder)
        answer = self._parse(stdout, said)
        metric, higher = answer.pop("metric", self.metric), answer.pop("higher_is_better", self.higher_is_better)
        if not isinstance(metric, str) or not metric or not isinstance(higher, bool):
            raise UsageError(f"{self}: 'metric' must be a name and 'higher_is_better' true or false, not {metric!r} and {higher!r}{said}")
        if self._is_answered and (metric, higher) != (self.metric, self.higher_is_better):
            raise UsageError(f"{self} changed 'metric' or 'higher_is_better' between two runs; print the same ones every time{said}")
        values = answer.pop("values", None)
        if values is not None and (not isinstance(values, list) or len(values) != len(drawn.pictures)):
            count = len(values) if isinstance(values, list) else "no list of"
            raise UsageError(
                f"{self} printed {count} values for {len(drawn.pictures)} pictures; print one per picture, in their order{said}"
            )
        scores = {key: self._number(key, value, said) for key, value in answer.items()}
        numbers = None if values is None else np.array([self._number("values", value, said) for value in values], np.float64)
        self.metric, self.higher_is_better, self._is_answered = metric, higher, True
        return Judgement(numbers, scores)

    def _run(self, folder: Path) -> tuple[bytes, str]:
        """(stdout, end of a message with the last line of stderr) of the program; both streams go to files, so that none can block it."""
        out, err = folder / "stdout", folder / "stderr"
        (folder / "run").mkdir()
        with out.open("wb") as stdout, err.open("wb") as stderr:
            try:
                process = subprocess.Popen(
                    [*self.words, str(folder / "pictures")],
                    cwd=folder / "run",
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            except OSError as error:
                raise UsageError(
                    f"{self} cannot be started ({error.strerror}); begin a script with its interpreter: #!/usr/bin/env python3"
                ) from error
            try:
                trouble = self._wait(process, out, err)
            finally:
                _kill(process)
        said = _last_line(err)
        if trouble is None and process.returncode:
            trouble = f"ended with code {process.returncode}"
        if trouble is not None:
            raise UsageError(f"{self} {trouble}{said}")
        return out.read_bytes(), said

    def _wait(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> str | None:
        """Wait for the end of `process`; what is wrong when it takes too long or prints too much."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                process.wait(min(WAIT_S, max(0.0, deadline - time.monotonic())))
                is_running = False
            except subprocess.TimeoutExpired:
                is_running = True
            for file, limit, stream in ((out, MAX_ANSWER_BYTES, "stdout"), (err, MAX_LOG_BYTES, "stderr")):
                if file.stat().st_size > limit:
                    return f"printed more than {limit >> 20} MiB on {stream}; {CONTRACT}"
            if not is_running:
                return None
            if time.monotonic() >= deadline:
                return f"did not end within {self.timeout_s:g} s and was stopped; give fewer pictures or make it faster"

    def _parse(self, stdout: bytes, said: str) -> dict[str, Any]:
        """The JSON object that is all of `stdout` or its last line: libraries print while they load."""
        text = stdout.decode(errors="replace").strip()
        answer: Any = None
        for candidate in (text, text.rpartition("\n")[2]):
            try:
                answer = json.loads(candidate)
            except (ValueError, RecursionError):
                continue
            break
        if not isinstance(answer, Mapping):
            shown = f"printed {text[:60]!r}, which is no JSON object" if text else "printed nothing"
            raise UsageError(f"{self} {shown}; {CONTRACT}{said}")
        if "overall" not in answer:
            raise UsageError(f"{self} printed no number 'overall'; {CONTRACT}{said}")
        return dict(answer)

    def _number(self, key: str, value: Any, said: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UsageError(f"{self} printed {value!r:.60} under {key!r}; all but metric and higher_is_better are numbers{said}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise NumericsError(f"{self} printed {value!r:.60} under {key!r}; print finite numbers{said}")
        return number


def _write(drawn: Drawn, folder: Path) -> None:
    """Write 0000.png, 0001.png, ... and prompts.jsonl."""
    from PIL import Image

    folder.mkdir()
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as lines:
        for i, (picture, prompt, seed) in enumerate(zip(drawn.pictures, drawn.prompts, drawn.seeds, strict=True)):
            Image.fromarray(picture).save(folder / f"{i:04d}.png", compress_level=1)
            lines.write(json.dumps({"picture": f"{i:04d}.png", "prompt": prompt, "seed": int(seed)}) + "\n")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Stop `process`, and what it started, if it still runs; the number of one that ended may already be another group's."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # macOS says the latter for a group that only has zombies
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _last_line(file: Path) -> str:
    """End of a message with the last line of the text `file` that is not empty; "" without one."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        lines = stream.read().decode(errors="replace").replace("\r", "\n").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; its last line on stderr: {last[:300]}" if last else ""
