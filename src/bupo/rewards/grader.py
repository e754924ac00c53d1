"""math-verify in child processes that can be killed.

math-verify stops itself with signals, which work in a main thread only, and an expression can hang where no signal is
looked at. So each answer is graded in a child process, and a child that misses the deadline is killed and replaced.
"""

import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import IO, NamedTuple

from bupo.errors import UserError
from bupo.signals import unheard


class Verdict(StrEnum):
    """What became of an answer. Only `correct` earns a reward; the others are counted apart.

    `unevaluated` is equal to a gold number, but a sum, product or quotient: the question again, not its answer. `no_gold`:
    the gold answer holds no expression that math-verify can read.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNEVALUATED = "unevaluated"
    UNPARSABLE = "unparsable"
    NO_GOLD = "no_gold"
    TIMEOUT = "timeout"


_INTEGER = re.compile(r"-?\d{1,300}")
_BOXED_INTEGER = re.compile(r"\\boxed\{(-?\d{1,300})\}")
_START_SECONDS = 120  # importing sympy on a busy machine


class Grade(NamedTuple):
    """A verdict, and what the answer comes to as text (None where it holds no expression), for majority votes."""

    verdict: Verdict
    value: str | None


def _integer_grade(answer: str, gold: str) -> Grade | None:
    """The grade where both are plain integers, which needs no algebra; None otherwise."""
    if answer.count("\\boxed") != 1 or not _INTEGER.fullmatch(gold.strip()):
        return None
    boxed = _BOXED_INTEGER.search(answer)
    if boxed is None:
        return None
    return Grade(Verdict.CORRECT if int(boxed[1]) == int(gold) else Verdict.WRONG, str(int(boxed[1])))


class _Child:
    """One worker process and its pipe."""

    @unheard()  # the run that it grades for decides what is finished
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bupo.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)  # a request may be longer than the pipe holds
        if self._reply(time.monotonic() + _START_SECONDS) is None:
            self.kill()
            raise RuntimeError("the grading process did not start: is math-verify installed?")

    def grade(self, answer: str, gold: str, deadline: float) -> dict | None:
        """The child's reply, or None if it missed the deadline or died."""
        request = memoryview(json.dumps({"answer": answer, "gold": gold}).encode() + b"\n")
        end = time.monotonic() + deadline
        try:
            while request:
                if not _ready(self.requests, select.POLLOUT, end):
                    return None
                request = request[os.write(self.requests.fileno(), request) :]
        except BrokenPipeError:
            return None
        return self._reply(end)

    def _reply(self, end: float) -> dict | None:
        line = b""
        while not line.endswith(b"\n"):
            chunk = os.read(self.replies.fileno(), 65536) if _ready(self.replies, select.POLLIN, end) else b""
            if not chunk:
                return None
            line += chunk
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.replies.close()
        self.requests.close()


def _ready(pipe: IO[bytes], event: int, end: float) -> bool:
    """Wait until a pipe can be read or written, at most until `end`."""
    poll = select.poll()
    poll.register(pipe, event)
    return bool(poll.poll(1000 * max(0.0, end - time.monotonic())))


class MathGrader:
    """Grades answers against gold answers by math-verify, in child processes with a deadline for each answer.

    Args:
        deadline (`float`, *optional*, defaults to `5.0`): seconds an answer may take.
        processes (`int`, *optional*): number of children, by default the number of cores, at most 8.

    The children start with the first answer that needs one and end with [`close`], or with this process.
    """

    def __init__(self, deadline: float = 5.0, processes: int | None = None):
        self.deadline = deadline
        self._free: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()  # None: not started yet
        self.processes = processes or min(8, os.cpu_count() or 1)
        for _ in range(self.processes):
            self._free.put(None)

    def grade(self, answers: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        """The verdict of each answer: of `examine`."""
        return [grade.verdict for grade in self.examine(answers, golds)]

    def examine(self, answers: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """The grade of each answer.

        Raises:
            UserError: if the lengths differ.
        """
        if len(answers) != len(golds):
            raise UserError(f"{len(answers)} answers were given with {len(golds)} gold answers: one each is needed")
        grades: list[Grade | None] = [_integer_grade(answer, gold) for answer, gold in zip(answers, golds, strict=True)]
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index, grade in enumerate(grades):
            if grade is None:
                waiting.put(index)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not errors:
                    index = waiting.get_nowait()
                    grades[index] = self._grade_one(answers[index], golds[index])
            except queue.Empty:
                pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(min(self.processes, waiting.qsize()))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()  # ends: every wait inside has a deadline
        if errors:
            raise errors[0]
        return grades  # type: ignore[return-value]

    def _grade_one(self, answer: str, gold: str) -> Grade:
        child = self._free.get()
        reply = None
        try:
            child = child or _Child()
            reply = child.grade(answer, gold, self.deadline)
        finally:
            if reply is None and child is not None:
                child.kill()
                child = None
            self._free.put(child)
        if reply is None:
            return Grade(Verdict.TIMEOUT, None)
        return Grade(Verdict(reply["verdict"]), reply["value"])

    def close(self) -> None:
        """End the children."""
        for _ in range(self.processes):
            child = self._free.get()
            if child is not None:
                child.kill()
            self._free.put(None)


def check_golds(golds: Sequence[str], where: str) -> None:
    """Refuse gold answers that cannot be graded against, before a run gives no reward for hours.

    Raises:
        UserError: with the first such row.
    """
    grader = MathGrader()
    try:
        grades = grader.examine([f"\\boxed{{{gold}}}" for gold in golds], golds)
    finally:
        grader.close()
    for row, (gold, grade) in enumerate(zip(golds, grades, strict=True)):
        if grade.verdict == Verdict.NO_GOLD:
            raise UserError(
                f"{where}, row {row}: the gold answer {gold[:80]!r} holds no mathematical expression that math-verify can read"
            )
