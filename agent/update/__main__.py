"""The update process: ``python -m agent.update refresh|fetch``. It says how it ended in one line of JSON.

It lives for one check or one file, so that the supervisor never holds
python-tuf or a cryptographic library.
"""

import argparse
import logging
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.core.layout import Layout
from contract.errors import PitheadError

log = logging.getLogger("agent.update")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded."""
    options = _parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s %(facts)s", defaults={"facts": ""}))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    layout = Layout(options.root)
    now = time.time_ns() // 1000
    try:
        result = (
            _refresh(layout, options, now) if options.command == "refresh" else _fetch(layout, options, now)
        )
    except PitheadError as error:
        result = {"ok": False, "code": error.code, "detail": error.detail, "facts": _plain(error.facts)}
    except Exception as error:
        log.exception("update.failed")
        result = {
            "ok": False,
            "code": "internal.error",
            "detail": f"{type(error).__name__}: {error}",
            "facts": {},
        }
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    sys.stdout.flush()
    return 0 if result["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m agent.update", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    refresh = commands.add_parser("refresh", help="verify a bundle")
    refresh.add_argument("--bundle", type=Path, required=True)
    fetch = commands.add_parser("fetch", help="fetch one verified file")
    fetch.add_argument("--sha256", required=True)
    fetch.add_argument("--length", type=int, required=True)
    fetch.add_argument("--target", required=True, help="TUF target path")
    fetch.add_argument("--server", required=True, metavar="URL", help="https://host:port")
    fetch.add_argument("--deadline-s", type=float, default=3600.0, help="for the whole file")
    for command in (refresh, fetch):
        command.add_argument("--root", type=Path, required=True)
    return parser


def _refresh(layout: Layout, options: argparse.Namespace, now: int) -> dict[str, Any]:
    _leave_out_urllib3()
    from agent.update.refresh import refresh  # noqa: PLC0415  `fetch` does without python-tuf

    outcome = refresh(layout, options.bundle, now)
    return {"ok": True, "desired": outcome.desired, "time_floor": outcome.time_floor}


def _fetch(layout: Layout, options: argparse.Namespace, now: int) -> dict[str, Any]:
    from agent.update.fetch import fetch  # noqa: PLC0415  `refresh` does without HTTP
    from agent.update.verified import VerifiedFile  # noqa: PLC0415

    file = VerifiedFile(options.sha256, options.length)
    fetch(layout, options.target, file, server=options.server, now=now, deadline_s=options.deadline_s)
    return {"ok": True}


def _leave_out_urllib3() -> None:
    """Spare this process python-tuf's HTTP client, which it imports at once and never uses.

    It is a third of the start-up time, twice per update on every device.
    """
    unused = types.ModuleType("tuf.ngclient.urllib3_fetcher")
    vars(unused)["Urllib3Fetcher"] = type("Urllib3Fetcher", (), {})
    sys.modules.setdefault(unused.__name__, unused)


def _plain(facts: dict[str, object]) -> dict[str, object]:
    return {k: v if isinstance(v, str | int | float | bool | None) else str(v) for k, v in facts.items()}


if __name__ == "__main__":
    raise SystemExit(main())
