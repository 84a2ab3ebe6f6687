"""The long work, each piece in a thread that waits for a child process: metadata, downloads, probes."""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from agent.core.layout import Layout
from agent.core.plan import Fetch, Probe
from agent.service.events import Fetched, Post, Probed, Refreshed
from contract.errors import ERRORS, PitheadError
from contract.manifest import Manifest
from contract.messages import Desired, Name, Sha256
from inference import probing
from inference.accelerators import NO_LIMITS, CustomTable, Resources

log = logging.getLogger(__name__)
REFRESH_S: Final = 120.0
FETCH_S: Final = 6 * 3600.0
LOCK_POLL_S: Final = 0.2
LIMITS: Final = probing.Limits(wall_s=60.0)


class Download(Struct, frozen=True):
    """One artifact to be fetched."""

    target: str
    """Its TUF target path."""
    sha256: Sha256
    length: int


class UpdateAnswer(Struct, frozen=True):
    """The one line that the update process prints."""

    ok: bool
    desired: Desired | None = None
    code: str = "internal.error"
    detail: str = ""


class Children:
    """Runs at most one step per model, and one update process and one probe at a time."""

    def __init__(
        self,
        layout: Layout,
        post: Post,
        *,
        server: str,
        require_sandbox: bool = False,
        custom: CustomTable | None = None,
        resources: Resources = NO_LIMITS,
    ) -> None:
        """``custom`` and ``resources`` are the tables ``[accelerators]`` and ``[engine]`` of the settings."""
        self.layout = layout
        self.require_sandbox = require_sandbox
        self._custom = custom
        self._resources = resources
        self.server = server
        self._post = post
        self._running: dict[Name, tuple[Fetch | Probe, threading.Event]] = {}
        self._refreshing = False
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def running(self, model_name: Name) -> Fetch | Probe | None:
        """Return the step that runs for a model."""
        with self._lock:
            entry = self._running.get(model_name)
        return entry[0] if entry is not None and not entry[1].is_set() else None

    @property
    def fetching(self) -> bool:
        """Whether any download is under way."""
        with self._lock:
            return any(isinstance(step, Fetch) for step, _ in self._running.values())

    @property
    def probing(self) -> bool:
        """Whether a probe runs, also one that nobody waits for any more: only one may, since they measure."""
        with self._lock:
            return any(isinstance(step, Probe) for step, _ in self._running.values())

    @property
    def refreshing(self) -> bool:
        """Whether a bundle is being verified."""
        return self._refreshing

    def refresh(self, etag: str | None) -> None:
        """Verify the downloaded bundle; ``Refreshed`` tells how it went."""
        self._refreshing = True
        threading.Thread(target=self._refresh, args=(etag,), name="refresh", daemon=True).start()

    def fetch(self, step: Fetch, downloads: Sequence[Download]) -> None:
        """Download what is missing; ``Fetched`` tells how it went."""
        cancel = self._begin(step)
        if cancel is not None:
            threading.Thread(
                target=self._fetch, args=(step, downloads, cancel), name="fetch", daemon=True
            ).start()

    def probe(self, step: Probe, manifest: Manifest, files: Mapping[str, Path]) -> None:
        """Probe one variant on what this device has for it; ``Probed`` tells how it went."""
        cancel = self._begin(step)
        if cancel is not None:
            threading.Thread(
                target=self._probe, args=(step, manifest, files, cancel), name="probe", daemon=True
            ).start()

    def cancel(self, model_name: Name) -> None:
        """Stop what runs for a model; no event will come of it."""
        with self._lock:
            entry = self._running.get(model_name)
        if entry is not None:
            entry[1].set()

    def stop(self) -> None:
        """Stop everything."""
        self._stopping.set()
        with self._lock:
            cancels = [cancel for _, cancel in self._running.values()]
        for cancel in cancels:
            cancel.set()

    def _begin(self, step: Fetch | Probe) -> threading.Event | None:
        with self._lock:
            if step.wanted.model_name in self._running:
                return None  # a cancelled one is still ending
            cancel = threading.Event()
            self._running[step.wanted.model_name] = (step, cancel)
            return cancel

    def finished(self, step: Fetch | Probe) -> None:
        """Make room for the model's next step; called when the event of this one is dealt with."""
        with self._lock:
            self._running.pop(step.wanted.model_name, None)

    def _end(self, step: Fetch | Probe, cancel: threading.Event, event: Fetched | Probed) -> None:
        if cancel.is_set():
            self.finished(step)
        else:
            self._post(event)

    def _refresh(self, etag: str | None) -> None:
        result: Desired | PitheadError
        try:
            answer = self._update(["refresh", "--bundle", str(self.layout.bundle)], REFRESH_S, self._stopping)
            result = answer if answer is not None else _failed("internal.error", "no document in the answer")
        except PitheadError as error:
            result = error
        except _Cancelled:
            return
        except Exception as failure:
            log.exception("refresh.failed")
            result = _failed("internal.error", f"{type(failure).__name__}: {failure}")
        finally:
            self._refreshing = False
        self._post(Refreshed(etag, result))

    def _fetch(self, step: Fetch, downloads: Sequence[Download], cancel: threading.Event) -> None:
        error = None
        try:
            for d in downloads:
                path = self.layout.object(d.sha256)
                if path.exists() and path.stat().st_size == d.length:
                    continue
                wanted = ["--sha256", d.sha256, "--length", str(d.length), "--target", d.target]
                self._update(["fetch", *wanted, "--server", self.server], FETCH_S, cancel)
                if not path.exists():
                    raise _failed("internal.error", f"{d.target} did not arrive")  # noqa: TRY301
        except PitheadError as failure:
            error = failure
        except _Cancelled:
            cancel.set()
        except Exception as failure:
            log.exception("fetch.failed")
            error = _failed("internal.error", f"{type(failure).__name__}: {failure}")
        self._end(step, cancel, Fetched(step, error))

    def _probe(
        self, step: Probe, manifest: Manifest, files: Mapping[str, Path], cancel: threading.Event
    ) -> None:
        result: probing.Choice | PitheadError
        try:
            reports = probing.probe(
                manifest,
                files,
                variants=[step.variant],
                limits=LIMITS,
                require_sandbox=self.require_sandbox,
                until_settled=True,
                custom=self._custom,
                resources=self._resources,
            )
            result = probing.choose(reports, manifest)
        except PitheadError as error:
            result = error
        except Exception as error:
            log.exception("probe.failed")
            result = _failed("internal.error", f"{type(error).__name__}: {error}")
        self._end(step, cancel, Probed(step, result))

    def _update(self, arguments: Sequence[str], limit_s: float, cancel: threading.Event) -> Desired | None:
        """Run the update process; raise what it reports, or ``_Cancelled``."""
        action, *rest = arguments
        command = [sys.executable, "-P", "-m", "agent.update", action, "--root", str(self.layout.root), *rest]
        with self._update_lock(cancel) as lock:
            output, errors, status = _run(command, lock, limit_s, cancel)
        return _answer(action, output, errors, status)

    @contextlib.contextmanager
    def _update_lock(self, cancel: threading.Event) -> Iterator[int]:
        """Hold the lock that an update process inherits.

        It is free only when the last of them has ended, also one that a
        killed supervisor left behind, so that two never write one file.
        """
        path = self.layout.update_lock
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if cancel.wait(LOCK_POLL_S):
                        raise _Cancelled from None
            yield descriptor
        finally:
            os.close(descriptor)


class _Cancelled(BaseException):
    """Nobody wants the result any more."""


def _run(
    command: Sequence[str], lock: int, limit_s: float, cancel: threading.Event
) -> tuple[bytes, bytes, int]:
    deadline = time.monotonic() + limit_s
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        start_new_session=True,
        pass_fds=(lock,),
    ) as child:
        while True:
            try:
                output, errors = child.communicate(timeout=LOCK_POLL_S)
            except subprocess.TimeoutExpired:
                late = time.monotonic() > deadline
                if not late and not cancel.is_set():
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                if cancel.is_set():
                    raise _Cancelled from None
                raise _failed("install.interrupted", f"killed after {limit_s:.0f} s") from None
            return output, errors, child.returncode


def _answer(action: str, output: bytes, errors: bytes, status: int) -> Desired | None:
    lines = output.splitlines()
    try:
        answer = msgspec.json.decode(lines[-1] if lines else b"", type=UpdateAnswer)
    except msgspec.MsgspecError as error:
        last = errors.decode("utf-8", errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise _failed("install.interrupted", f"{action} ended with status {status}: {last[0]}") from error
    if not answer.ok:
        raise _failed(answer.code if answer.code in ERRORS else "internal.error", answer.detail)
    return answer.desired


def _failed(code: str, detail: str) -> PitheadError:
    return PitheadError(code, detail[:2000])
