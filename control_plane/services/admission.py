"""Look at an uploaded package in a process of its own, before anybody relies on it."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from contract.errors import PitheadError

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 600.0
SHOWN: Final = 1500
"""Characters of the child's output that an error quotes."""


def validate(directory: Path, *, require_sandbox: bool = False) -> dict[str, Any]:
    """Return the report of ``python -m models validate DIRECTORY --json``.

    The child opens the model files in the sandbox; nothing of them is ever
    loaded here. Raises ``release.not_admitted`` with what it said.
    """
    command = [sys.executable, "-P", "-m", "models", "validate", str(directory), "--json"]
    if require_sandbox:
        command.append("--require-sandbox")
    # The child needs no secret that this process may have in its environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PITHEAD_")}
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise PitheadError("release.not_admitted", f"validation did not end in {TIMEOUT_S:.0f} s") from error
    report = _last_object(ended.stdout)
    if ended.returncode != 0 or report.get("valid") is not True:
        said = ended.stderr.decode(errors="replace").strip()[-SHOWN:]
        detail = _detail(report) or said or f"the validation ended with {ended.returncode}"
        raise PitheadError("release.not_admitted", detail, report=report)
    return report


def _last_object(output: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(output, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    for line in reversed(output.splitlines()):
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return {}


def _detail(report: dict[str, Any]) -> str:
    code, detail = report.get("code"), report.get("detail")
    return ": ".join(str(part) for part in (code, detail) if part)[:SHOWN]
