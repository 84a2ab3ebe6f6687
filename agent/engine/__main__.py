"""``python -m agent.engine --socket PATH``: the data plane, which stays when its supervisor goes."""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from agent.engine import memory
from agent.engine.clock import Clock
from agent.engine.server import Server
from contract.errors import PitheadError
from inference.registry import installed


class JsonLines(logging.Formatter):
    """One JSON object a line: the event's name, and its facts as fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return ``record`` as JSON."""
        line = {
            "t": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": "engine",
            "event": record.getMessage(),
        }
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def main() -> int:
    """Run until SIGTERM, or until a newer engine has taken the socket."""
    parser = argparse.ArgumentParser(prog="python -m agent.engine", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on")
    parser.add_argument("--cpus", metavar="N,N", default="", help="processors to run on; default: all")
    parser.add_argument("--memory", metavar="BYTES", type=int, default=0, help="to hold at most; 0: no limit")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    arguments = parser.parse_args()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=arguments.log_level.upper(), handlers=[handler])
    faulthandler.enable()
    # Before there are other threads: they inherit it.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {int(n) for n in arguments.cpus.split(",") if n} or os.sched_getaffinity(0))
    memory.keep_within(arguments.memory)
    clock = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)
    try:
        server = Server(arguments.socket, clock, installed())
    except PitheadError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    signal.set_wakeup_fd(server.wake_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: server.stop())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if not server.run():
        # A thread is stuck in a model; the interpreter's own farewell would wait for it or crash in it.
        logging.shutdown()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
