"""Forks the processes of launches from one that has imported everything: each takes a third of its time. JSON lines.

`{"argv", "ranks", "log", "env"}` is answered by the processes' ids, `{"wait": ids, "deadline": seconds}` by the exit status of
each (negative: the signal that ended it; null: it had to be killed after the deadline) and the seconds until it ended. No
launcher stands above them, so they have to end by themselves.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time

from bupo.cli.process_exit import exit_process
from tests.faults.faulty import run


def start(argv, ranks, log, env):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        out = os.open(f"{log}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        if pid := os.fork():
            started.append(pid)
            os.close(out)
            continue
        os.environ.update(env)
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), out, out)):
            os.dup2(file, number)
        exit_process(run(argv))
    return started


def wait(wait, deadline):
    began, ended = time.monotonic(), {}
    while len(ended) < len(wait) and time.monotonic() - began < deadline:
        for pid in set(wait) - set(ended):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                ended[pid] = [os.waitstatus_to_exitcode(status), time.monotonic() - began]
        time.sleep(0.02)
    for pid in set(wait) - set(ended):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [ended.get(pid, [None, deadline]) for pid in wait]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in ("train", "eval", "analyze", "sample", "demo"):
        importlib.import_module(f"bupo.cli.{module}")
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(wait(**request) if "wait" in request else start(**request)), flush=True)
