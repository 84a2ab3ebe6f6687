"""``pithead-agent serve MODEL_DIR``: serve models without any control plane."""

import argparse
import asyncio
import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from contract.errors import PitheadError

if TYPE_CHECKING:
    from agent.engine.serve import http
    from agent.engine.serve.app import App

EXAMPLES: Final = """examples:
  pithead-agent serve models/                        packages, .onnx and .tflite files, Triton's layout
  pithead-agent serve detector.onnx --http-port 0    one file, on a free port
  pithead-agent serve models/ --grpc-port 8001       gRPC too
  pithead-agent serve models/ --memory-budget 200 --lazy
                                                     many models in 200 MB: the idle ones leave
  pithead-agent serve --new-token line-3 >> tokens   make a token; it is shown once, on standard error
  pithead-agent serve models/ --host 0.0.0.0 --token-file tokens --tls-cert c.pem --tls-key k.pem

  curl localhost:8000/v2/models/detector
  curl localhost:8000/v2/models/detector/infer -d '{"inputs": [{"name": "x", "datatype": "FP32",
       "shape": [1, 2], "data": [0.1, 0.2]}]}'

Models that nobody has signed are first opened in a sandbox; what passed is
remembered. SIGTERM and SIGINT end it after the requests that it has taken.
"""
_MB: Final = 1024 * 1024


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    made = argparse.ArgumentParser(
        prog="pithead-agent serve",
        description="Serve models over the Open Inference Protocol, without a control plane.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "models", metavar="MODEL_DIR", nargs="?", type=Path, help="a directory, or one model file"
    )
    listen = made.add_argument_group("listening")
    listen.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    listen.add_argument(
        "--http-port", type=int, default=8000, metavar="PORT", help="default: 8000; 0: a free one"
    )
    listen.add_argument(
        "--grpc-port", type=int, metavar="PORT", help="default: no gRPC; usual: 8001; 0: a free one"
    )
    listen.add_argument(
        "--token-file", type=Path, metavar="FILE", help="bearer tokens; needed beyond loopback"
    )
    listen.add_argument("--new-token", metavar="NAME", help="print a line for the token file, and end")
    listen.add_argument("--role", choices=["infer", "admin"], default="infer", help="of the new token")
    listen.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate chain")
    listen.add_argument("--tls-key", type=Path, metavar="PEM", help="its key")
    listen.add_argument("--max-body-mb", type=int, default=64, metavar="MB", help="default: 64")
    listen.add_argument("--max-connections", type=int, default=1000, metavar="N", help="default: 1000")
    listen.add_argument(
        "--client-timeout-s",
        type=float,
        metavar="S",
        help="for headers, body, idleness and reading; default: 10, 60, 75, 30",
    )
    models = made.add_argument_group("models")
    models.add_argument(
        "--versions",
        type=_versions,
        default=1,
        metavar="N",
        help="newest N of each model, or all; default: 1",
    )
    models.add_argument(
        "--memory-budget", type=int, default=0, metavar="MB", help="for all models; 0: no limit"
    )
    models.add_argument(
        "--memory-limit",
        type=int,
        metavar="MB",
        help="for the whole process; default: three quarters of the machine; 0: no limit",
    )
    models.add_argument("--lazy", action="store_true", help="load a model at its first request")
    models.add_argument("--threads", type=int, default=1, metavar="N", help="of a run; default: 1")
    models.add_argument("--probe-cache", type=Path, metavar="FILE", help="verdicts of the sandbox")
    runs = made.add_argument_group("batching and queues")
    runs.add_argument("--max-batch", type=int, default=64, metavar="ROWS", help="default: 64; 1: no batching")
    runs.add_argument("--latency-objective-ms", type=float, default=100.0, metavar="MS", help="of a batch")
    runs.add_argument(
        "--max-queue", type=int, default=512, metavar="N", help="requests that wait for a model"
    )
    runs.add_argument(
        "--max-wait-ms", type=float, default=1000.0, metavar="MS", help="refuse what would wait longer"
    )
    runs.add_argument("--timeout-s", type=float, default=30.0, metavar="S", help="from request to answer")
    made.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return made


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal; 0 after that, 2 for an error."""
    options = parser().parse_args(arguments)
    try:
        if options.new_token:
            return _new_token(options.new_token, options.role)
        if options.models is None:
            parser().error("MODEL_DIR is missing")
        return _serve(options)
    except PitheadError as error:
        sys.stderr.write(f"{error}\n{error.remedy}\n")
        return 2


def _versions(text: str) -> int:
    """Return how many of the newest versions are served; 0: all."""
    return 0 if text == "all" else int(text)


def _new_token(name: str, role: str) -> int:
    from agent.engine.serve import tokens  # noqa: PLC0415 - what is not needed costs nothing

    token, line = tokens.new("-".join(name.split()), role)
    sys.stdout.write(line + "\n")
    sys.stderr.write(f"{token}\nThis is the token; only its hash is in the line above.\n")
    return 0


@dataclass
class Outgrown:
    """What the loop leaves behind."""

    said: str = ""
    """What the server held; empty where it ended for another reason."""
    ports: dict[str, int] = field(default_factory=dict)


def _serve(options: argparse.Namespace) -> int:
    try:
        from agent.engine.serve import app  # noqa: PLC0415 - --help needs none of it
    except ImportError as error:
        raise PitheadError("config.invalid", f"install pithead[serve]: {error}") from error
    _log(options.log_level)
    # A loading thread that computes in Python must not keep the loop waiting for 5 ms at a time.
    sys.setswitchinterval(0.0005)
    began, outgrown = time.monotonic(), Outgrown()
    app.run(_main(options, outgrown))
    if outgrown.said:
        from agent.engine.serve.outgrown import begin_again  # noqa: PLC0415 - see above

        begin_again(outgrown.said, time.monotonic() - began, outgrown.ports)
    return 0


async def _main(options: argparse.Namespace, outgrown: Outgrown) -> None:
    from agent.core.memory import limit  # noqa: PLC0415 - see _serve
    from agent.engine import memory  # noqa: PLC0415
    from agent.engine.serve import reread  # noqa: PLC0415
    from agent.engine.serve.outgrown import watch  # noqa: PLC0415

    limit_bytes = limit(options.memory_limit, memory.machine_bytes())
    memory.keep_within(limit_bytes)
    app = _app(options)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await app.start()
        also = f"; gRPC on {app.grpc_address}" if app.grpc_address else ""
        sys.stdout.write(f"Listening on {app.url} (Open Inference Protocol v2, metrics at /metrics){also}\n")
        sys.stdout.flush()
        following = asyncio.create_task(reread.follow(options.models, app.service))
        outgrown.ports = {"http-port": app.port} | ({"grpc-port": app.grpc.port} if app.grpc else {})
        outgrown.said = await watch(limit_bytes, stop)
        following.cancel()
    finally:
        await app.stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Whoever asks twice must not turn an orderly end into a killed process.
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def _app(options: argparse.Namespace) -> "App":
    from agent.engine.serve import app, configuration, tokens  # noqa: PLC0415 - see _serve
    from agent.engine.serve.catalogue import Limits  # noqa: PLC0415
    from agent.engine.serve.repository import Directory  # noqa: PLC0415
    from agent.engine.serve.runner import Policy  # noqa: PLC0415
    from agent.engine.serve.verdicts import Verdicts, default_path  # noqa: PLC0415

    limits = Limits(
        policy=Policy(
            max_batch=max(1, options.max_batch),
            objective_s=options.latency_objective_ms / 1000,
            max_queue=max(1, options.max_queue),
            max_wait_s=options.max_wait_ms / 1000,
            timeout_s=options.timeout_s,
        ),
        versions=max(0, options.versions),
        memory_bytes=max(0, options.memory_budget) * _MB,
        lazy=options.lazy,
        configuration=configuration.read(options.models),
        learned=options.models / configuration.LEARNED if options.models.is_dir() else None,
    )
    listen = app.Listen(
        host=options.host,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        certificate=options.tls_cert,
        key=options.tls_key,
        limits=_client_limits(options),
    )
    source = Directory(options.models, Verdicts(options.probe_cache or default_path()), options.threads)
    known = None if options.token_file is None else tokens.read(options.token_file)
    return app.App([source], limits, listen, known)


def _client_limits(options: argparse.Namespace) -> "http.Limits":
    from agent.engine.serve import http  # noqa: PLC0415 - see _serve

    limits = http.Limits(connections=options.max_connections, body_bytes=options.max_body_mb * _MB)
    wait = options.client_timeout_s
    if wait is None:
        return limits
    return msgspec.structs.replace(limits, header_s=wait, body_s=wait, idle_s=wait, read_s=wait)


class _Facts(logging.Formatter):
    """The event's name and its facts, one line."""

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{key}={value}" for key, value in getattr(record, "facts", {}).items())
        line = f"{record.levelname.lower():<8}{record.getMessage()} {facts}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Facts())
    logging.basicConfig(level=level.upper(), handlers=[handler])
