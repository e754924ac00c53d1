"""Imports everything once, then forks a child for each run that it is told of: `python -m tests.faults.zygote`.

A line of JSON on stdin starts a run, `{"argv", "folder", "out", "env", "kill"}`; a line on stdout answers, `{"status"}`, as
`subprocess` gives it: negative for a signal. The child runs the command line's own code, in a session of its own.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kill: dict | None) -> None:
    """Make the process die at a moment.

    Args:
        kill (`dict`): `seconds` after the start; or at the `number`th (from 1) call of a function, `call`, such as
            `torch.save` or `os.rename`, `when` is `before` it, `after` it, or `half`: its file is written in part.
    """
    if kill is None:
        return
    if "seconds" in kill:
        timer = threading.Timer(kill["seconds"], die)
        timer.daemon = True
        timer.start()
        return
    owner, name = located(kill["call"])
    inner, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != kill["number"]:
            return inner(*args, **kwargs)
        if kill["when"] == "before":
            die()
        result = inner(*args, **kwargs)
        if kill["when"] == "half":
            path = next(value for value in args if isinstance(value, str | os.PathLike))
            os.truncate(path, os.path.getsize(path) // 2)
        die()
        return result

    setattr(owner, name, counted)


def located(path: str):
    """The module or class that a dotted path's last name stands in, and the name."""
    words = path.split(".")
    for end in range(len(words) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(words[:end]))
        except ModuleNotFoundError:
            continue
        for word in words[end:-1]:
            owner = getattr(owner, word)
        return owner, words[-1]
    raise ModuleNotFoundError(path)


def child(order: dict) -> None:
    """Run a command line, and end as its process would."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(order["out"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order.get("env") or {})
        os.chdir(order["folder"])
        before = order.get("before")
        if before:
            owner, name = located(before)
            getattr(owner, name)()
        arm(order.get("kill"))
        status = importlib.import_module("bupo.cli.main").main(order["argv"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        importlib.import_module("traceback").print_exc()
    finally:
        importlib.import_module("bupo.cli.process_exit").exit_process(status)


def wait(pid: int, seconds: float) -> int:
    """The child's end; after so many seconds it is killed, which is status -9."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the run did not end in {seconds} s")


def main() -> None:
    for name in ("torch", "trl", "peft", "bupo", "bupo.cli.train", "bupo.cli.analyze", "bupo.cli.eval"):
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(order)
        try:
            answer: dict = {"status": wait(pid, order.get("seconds", 300))}
        except TimeoutError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
