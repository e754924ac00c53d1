"""math-verify in child processes that can be killed.

math-verify stops itself with signals, which work in a main thread only, and an expression can hang where no signal is
looked at. So each answer is graded in a child process, and a child that misses the deadline is killed and replaced.
"""

import importlib.machinery
import json
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, NamedTuple

from bupo.rewards import grader_worker
from bupo.rewards.answers.equality import is_empty_gold
from bupo.rewards.answers.extraction import extract_final_answer, find_later_answer
from bupo.utils.errors import UserError
from bupo.utils.signals import blocked_signals


class Verdict(StrEnum):
    """What became of an answer. Only `correct` earns a reward; the others are counted apart.

    `unevaluated`, of strict verdicts: equal to the gold answer, but the question again, such as the sum that was to be done.
    `unparsable`: there is no final answer, or it cannot be read in the gold answer's class. `no_gold`: the gold answer is
    empty, or, of math-verify's own verdict, holds no expression that it can read.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNEVALUATED = "unevaluated"
    UNPARSABLE = "unparsable"
    NO_GOLD = "no_gold"
    TIMEOUT = "timeout"


class Grade(NamedTuple):
    """The two verdicts on an answer.

    Attributes:
        verdict ([`Verdict`]): of `verify(parse(gold), parse(answer))`, math-verify's own; never `unevaluated`.
        value (`str`, *optional*): the text of the final answer, at most 200 characters; None where there is none.
        strict ([`Verdict`]): the reward's: the final answer compared within the gold answer's class.
        reason (`str`, *optional*): why a strict verdict is `unparsable`: empty, no box or final answer, unclosed box,
            empty box, unfinished thinking, the answer is taken back, several answers, not readable.
    """

    verdict: Verdict
    value: str | None
    strict: Verdict
    reason: str | None = None


_INTEGER = re.compile(r"-?[0-9]{1,300}")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*|[0-9]{1,3})")  # more digits with a zero in front are a code
_BOXED_INTEGER = re.compile(r"\\boxed\{(-?[0-9]{1,300})\}")
_MAX_INLINE_LENGTH = 50_000  # characters: a longer answer is looked through in a process that can be killed
_END_OF_SENTENCE = re.compile(r"[\s$*.!)\]\\]*")
_MATH_VERIFY_CUES = re.compile(r"(?i)final answer|fbox|%|percent|pct")
_POLL_SECONDS = 0.5  # seconds of one wait for a child
_STARTUP_TIMEOUT = 120  # importing sympy on a busy machine
_WORKER_LIBRARIES = (
    "math_verify",
    "latex2sympy2_extended",
    "sympy",
    "mpmath",
    "antlr4",
    "reasoning_gym",
)  # what the worker imports


def _grade_integers(answer: str, gold: str) -> Grade | None:
    """The grade where both are plain integers, which needs no algebra; None otherwise, and where math-verify may look
    elsewhere: at what follows "final answer", which goes before a box that ends earlier, and at percentages.
    """
    if (
        len(answer) > _MAX_INLINE_LENGTH
        or answer.count("\\boxed") != 1
        or not _INTEGER.fullmatch(gold.strip())
        or not _NUMBER.fullmatch(gold.strip())
    ):
        return None
    boxed = _BOXED_INTEGER.search(answer)
    if boxed is None or (_MATH_VERIFY_CUES.search(answer) and not _is_box_final(answer, boxed)):
        return None
    verdict = Verdict.CORRECT if int(boxed[1]) == int(gold) else Verdict.WRONG
    if find_later_answer(answer) is not None:
        return None
    text, reason = extract_final_answer(answer)
    if text is None:
        return Grade(verdict, None, Verdict.UNPARSABLE, reason)
    return Grade(verdict, text[:200], verdict) if text == boxed[1] else None


def _is_box_final(answer: str, boxed: re.Match) -> bool:
    """Whether nothing but the end of a formula or sentence follows the box."""
    return (
        "fbox" not in answer and "hope" not in answer.lower() and bool(_END_OF_SENTENCE.fullmatch(answer, boxed.end()))
    )


def _get_worker_command() -> list[str]:
    """The worker: this Python without the working folder, `PYTHON*` variables and the user's own start-up files.

    A library that is found on this process' absolute path only (a folder of `PYTHONPATH`, say) is looked for there, too, but
    never in the working folder.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was deleted meanwhile
        here = ""
    safe = [place for place in sys.path if os.path.isabs(place) and os.path.realpath(place) != here]
    found = [importlib.machinery.PathFinder.find_spec(name, safe) for name in _WORKER_LIBRARIES]
    packages = [place for spec in found if spec for place in spec.submodule_search_locations or ()]
    places = dict.fromkeys(str(Path(place).parent) for place in packages)
    return [sys.executable, "-I", str(Path(grader_worker.__file__).resolve()), *places]


def _get_worker_environment() -> dict[str, str]:
    """What Python needs to start, and no more: no token, no setting."""
    kept = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"OMP_NUM_THREADS": "1"}


class _Deadline:
    """A number of seconds in which this process ran: one that is stopped, or its machine asleep, uses none of them.

    Args:
        seconds (`float`): until it has passed.
    """

    def __init__(self, seconds: float):
        self.remaining, self._last = seconds, time.monotonic()

    def wait(self, pipe: IO[bytes], event: int) -> bool:
        """Wait until a pipe can be read or written, at most until the deadline; return whether it can."""
        poll = select.poll()
        poll.register(pipe, event)
        while True:
            if poll.poll(1000 * max(0.0, min(self.remaining, _POLL_SECONDS))):
                return True
            if self.remaining <= 0:
                return False
            now = time.monotonic()
            self.remaining -= min(now - self._last, 2 * _POLL_SECONDS)  # a longer wait than that has not been ours
            self._last = now


class _WorkerProcess:
    """One worker process and its pipe. Ctrl-C is not for it: the update that it grades for is finished and saved."""

    @blocked_signals()  # the run that it grades for decides what is finished
    def __init__(self):
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self.num_requests = 0
        self.prepared: set[str] = set()  # tasks whose problems have been made
        alone: dict[str, Any] = {"env": _get_worker_environment(), "cwd": "/", "start_new_session": True}
        try:
            self.process = subprocess.Popen(_get_worker_command(), stdin=pipe, stdout=pipe, stderr=nowhere, **alone)
        except OSError as error:  # no memory, or too many processes
            raise UserError(f"the grading process cannot start: {error}") from error
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)  # a request may be longer than the pipe holds
        ready = self._read_reply(_Deadline(_STARTUP_TIMEOUT))
        if ready is None or "error" in ready:
            try:
                silent = f"it ended with status {self.process.wait(0.5)}"
            except subprocess.TimeoutExpired:
                silent = f"no word in {_STARTUP_TIMEOUT} s"
            self.kill()
            raise UserError(f"the grading process cannot start: {(ready or {}).get('error', silent)}")

    def grade(self, answer: str, gold: str, deadline: float, problem: str | None = None) -> Grade | None:
        """The child's grade, or None if it missed the deadline, died, or says what is no answer to this request."""
        task = json.loads(problem)["task"] if problem else None
        if task and task not in self.prepared:
            self._send_request({"problem": problem, "deadline": _STARTUP_TIMEOUT})
            self.prepared.add(task)
        reply = self._send_request({"answer": answer, "gold": gold, "problem": problem, "deadline": deadline})
        try:
            return Grade(Verdict(reply["verdict"]), reply["value"], Verdict(reply["strict"]), reply.get("reason"))
        except (KeyError, ValueError):
            return None

    def _send_request(self, request_fields: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the reply; an empty one if it missed the deadline or is no reply to this request."""
        self.num_requests += 1
        request = memoryview(json.dumps({"number": self.num_requests, **request_fields}).encode() + b"\n")
        end = _Deadline(request_fields["deadline"])
        try:
            while request:
                if not end.wait(self.requests, select.POLLOUT):
                    return {}
                request = request[os.write(self.requests.fileno(), request) :]
        except BrokenPipeError:
            return {}
        reply = self._read_reply(end) or {}
        return reply if reply.get("number") == self.num_requests else {}

    def _read_reply(self, end: _Deadline) -> dict | None:
        line = b""
        while not line.endswith(b"\n"):
            chunk = os.read(self.replies.fileno(), 65536) if end.wait(self.replies, select.POLLIN) else b""
            if not chunk:
                return None
            line += chunk
        try:
            reply = json.loads(line)
        except ValueError:  # it was made to write something else
            return None
        return reply if isinstance(reply, dict) else None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close_pipes()

    def close_pipes(self) -> None:
        """Close the pipes. The child ends once nobody holds them."""
        self.replies.close()
        self.requests.close()


class MathGrader:
    """Grades answers against gold answers by math-verify, in child processes with a deadline for each answer.

    Args:
        deadline (`float`, *optional*, defaults to `5.0`): seconds an answer may take.
        processes (`int`, *optional*): number of children, by default the number of cores, at most 8.

    The children start with the first answer that needs one and end with [`close`], or with this process.
    """

    def __init__(self, deadline: float = 5.0, processes: int | None = None):
        self.deadline = deadline
        self._free: queue.SimpleQueue[_WorkerProcess | None] = queue.SimpleQueue()  # None: not started yet
        self.processes = processes or min(8, os.cpu_count() or 1)
        for _ in range(self.processes):
            self._free.put(None)
        self._children: set[_WorkerProcess] = set()
        _graders.add(self)

    def grade(
        self, answers: Sequence[str], golds: Sequence[str], problems: Sequence[str | None] | None = None
    ) -> list[Verdict]:
        """The strict verdict of each answer."""
        return [grade.strict for grade in self.get_grades(answers, golds, problems)]

    def get_grades(
        self, answers: Sequence[str], golds: Sequence[str], problems: Sequence[str | None] | None = None
    ) -> list[Grade]:
        """The grade of each answer.

        Args:
            answers, golds (`list[str]`): completions and gold answers.
            problems (`list[str | None]`, *optional*): names of problems whose tasks have a scorer, which then gives both
                verdicts ([`bupo.rewards.task_scorers`]).

        Raises:
            UserError: if the lengths differ.
        """
        problems = [None] * len(answers) if problems is None else problems
        if len(answers) != len(golds):
            raise UserError(f"{len(answers)} answers were given with {len(golds)} gold answers: one each is needed")
        grades: list[Grade | None] = [
            None if problem else _grade_integers(answer, gold)
            for answer, gold, problem in zip(answers, golds, problems, strict=True)
        ]
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index, grade in enumerate(grades):
            if grade is None:
                waiting.put(index)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                while not errors:
                    index = waiting.get_nowait()
                    grades[index] = self._grade_one(answers[index], golds[index], problems[index])
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

    def _grade_one(self, answer: str, gold: str, problem: str | None) -> Grade:
        child, grade = self._free.get(), None
        try:
            if child is None:
                self._children.add(child := _WorkerProcess())
            grade = child.grade(answer, gold, self.deadline, problem)
        finally:
            if grade is None and child is not None:
                self._children.discard(child)
                child.kill()
                child = None
            self._free.put(child)
        return grade or Grade(Verdict.TIMEOUT, None, Verdict.TIMEOUT)

    def group_equal_answers(self, answers: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """Number the classes of equal answers to each problem, by the strict comparison.

        Args:
            answers (`list[list[str | None]]`): final answers by problem, as of `Grade.value`; None where there is none.

        Returns:
            `list[list[int | None]]`: a class by problem and answer, from 0; None where there is no answer. Two answers that are
            written alike are always of one class.
        """
        numbers: list[dict[str, int]] = [{} for _ in answers]
        left = [list(dict.fromkeys(text for text in texts if text is not None)) for texts in answers]
        while any(left):
            pairs = []
            for problem, texts in enumerate(left):
                if texts:
                    first = texts.pop(0)
                    numbers[problem][first] = len(set(numbers[problem].values()))
                    pairs += [(problem, first, text) for text in texts]
            verdicts = self.grade([f"\\boxed{{{text}}}" for _, _, text in pairs], [first for _, first, _ in pairs])
            for (problem, first, text), verdict in zip(pairs, verdicts, strict=True):
                if verdict == Verdict.CORRECT:
                    numbers[problem][text] = numbers[problem][first]
                    left[problem].remove(text)
        return [
            [None if text is None else known[text] for text in texts]
            for known, texts in zip(numbers, answers, strict=True)
        ]

    def close(self) -> None:
        """End the children."""
        for _ in range(self.processes):
            child = self._free.get()
            if child is not None:
                self._children.discard(child)
                child.kill()
            self._free.put(None)

    def reset_after_fork(self) -> None:
        """In a forked process: leave the children to the parent, whose end they would else outlive, and start others."""
        for child in self._children:
            child.close_pipes()
        self._children = set()
        self._free = queue.SimpleQueue()
        for _ in range(self.processes):
            self._free.put(None)


_graders: weakref.WeakSet[MathGrader] = weakref.WeakSet()


def _reset_graders_after_fork() -> None:
    for grader in _graders:
        grader.reset_after_fork()


os.register_at_fork(after_in_child=_reset_graders_after_fork)


def check_gold_answers(golds: Sequence[str], where: str) -> None:
    """Refuse gold answers that cannot be graded against, before a run gives no reward for hours.

    Raises:
        UserError: with the first such row.
    """
    for row, gold in enumerate(golds):
        if len(gold) < 1000 and is_empty_gold(gold):
            raise UserError(
                f"{where}, row {row}: the gold answer {gold!r} is no answer: give the problem one, or leave it out"
            )
