"""The broker: mosquitto with mutual TLS, where a device can speak as itself only.

The name in the certificate becomes user name and client id, and the access
list is made of patterns with ``%u``; no name is ever believed that a client
sends. A reload of mosquitto fails open (a broken access list lets everybody
do everything), so the files here are written whole, and the list is read
back before it is used.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509

from contract.errors import PitheadError
from contract.topics import ROOT
from provisioning import durable

INGEST_SERVICE: Final = "svc-ingest"
PID_FILE: Final = "mosquitto.pid"
END_OF_CRL: Final = b"-----END X509 CRL-----"
AUTHORITIES_OF_CLIENTS: Final = 2
BROKER_USER: Final = "mosquitto"
MESSAGE_LIMIT: Final = 1024 * 1024
"""Above the protocol's own limit: a device that breaks that one shall be recorded, not merely cut off."""

QUEUE_BYTES: Final = 256 * 1024 * 1024
"""Kept for a client that is away, our own ingest above all. What is dropped, devices send again."""
MEMORY_BYTES: Final = 1024 * 1024 * 1024
"""Of the broker as a whole; beyond it clients are refused, and the machine lives."""

ACCESS_LIST: Final = f"""\
# Written by Pithead. %u is the name in the client's certificate.
user {INGEST_SERVICE}
topic read {ROOT}/+/up/#
topic write {ROOT}/+/down/#

pattern write {ROOT}/%u/up/+
pattern read {ROOT}/%u/down/+
"""


class BrokerFiles(msgspec.Struct, frozen=True):
    """What the broker needs of the authorities, in PEM."""

    trusted: bytes
    """Certificates of the device and of the service authority."""
    certificate: bytes
    key: bytes
    revoked: bytes
    """Revocation lists of both authorities: mosquitto refuses clients of an authority without one."""


def write(directory: Path, files: BrokerFiles, *, port: int, bind: str = "") -> Path:
    """Write everything that the broker reads; return the path of ``mosquitto.conf``.

    It listens on all addresses when ``bind`` is empty.
    """
    directory = directory.absolute()
    user = _user_for(directory)
    private = durable.PRIVATE
    durable.make_directory(directory, 0o700)
    durable.make_directory(directory / "data", 0o700)
    if user == BROKER_USER:  # it may read all of it, and write its data only
        directory.chmod(0o750)
        shutil.chown(directory, group=user)
        shutil.chown(directory / "data", user, user)
        private = 0o640
    durable.write(directory / "acl", ACCESS_LIST.encode(), private)
    durable.write(directory / "trusted.pem", files.trusted)
    write_certificate(directory, files.certificate, files.key)
    write_revocations(directory, files.revoked)
    config = directory / "mosquitto.conf"
    durable.write(config, _config(directory, port, bind, user).encode())
    return config


def write_certificate(directory: Path, certificate: bytes, key: bytes) -> None:
    """Replace the broker's own certificate. It reads it when it starts and on SIGHUP."""
    private = 0o640 if directory.stat().st_mode & 0o050 else durable.PRIVATE
    durable.write(directory / "server.key", key, private)
    durable.write(directory / "server.pem", certificate)


def write_revocations(directory: Path, revoked: bytes) -> None:
    """Replace the revocation lists. The broker reads them when it starts and on SIGHUP."""
    durable.write(directory / "crl.pem", revoked)


def reload(directory: Path) -> bool:
    """Ask the running broker of ``directory`` to read its files again; False when none can be asked.

    The files are parsed first, since mosquitto takes a broken one for an
    empty one, and everybody would be let in. That it has read them is for
    ``eviction.prove`` to show.
    """
    process = running(directory)
    if process is None or not _accepts(*listener(directory / "mosquitto.conf")):
        return False  # one that is still starting would die of the signal, and reads the files anyway
    if (directory / "acl").read_text(encoding="utf-8") != ACCESS_LIST:
        raise PitheadError("config.invalid", f"{directory / 'acl'} was changed; write it again: pithead init")
    _check_revocations(directory / "crl.pem")
    return _signal(process, signal.SIGHUP)


def stop_running(directory: Path) -> bool:
    """End the broker of ``directory``, whoever has started it; False when none can be told."""
    process = running(directory)
    return process is not None and _signal(process, signal.SIGTERM)


def _signal(process: int, number: signal.Signals) -> bool:
    try:
        os.kill(process, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def running(directory: Path) -> int | None:
    """Return the process id of the broker of ``directory`` if it runs on this machine."""
    try:
        process = int((directory / "data" / PID_FILE).read_text(encoding="utf-8"))
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    config = (directory / "mosquitto.conf").resolve()
    named = [after for option, after in pairwise(command) if option in {b"-c", b"--config-file"}]
    here = Path(f"/proc/{process}/cwd")
    return process if any((here / os.fsdecode(name)).resolve() == config for name in named) else None


def _check_revocations(path: Path) -> None:
    text = path.read_bytes()
    lists = [END_OF_CRL.join((part, b"")) for part in text.split(END_OF_CRL)[:-1]]
    try:
        parsed = [x509.load_pem_x509_crl(part) for part in lists]
    except ValueError as error:
        raise PitheadError("config.invalid", f"{path}: {error}") from error
    if len(parsed) != AUTHORITIES_OF_CLIENTS:
        raise PitheadError("config.invalid", f"{path} holds {len(parsed)} lists")


def executable() -> str:
    """Return the path of mosquitto; Debian keeps it where an ordinary user's PATH does not look."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise PitheadError("config.invalid", "mosquitto is not installed (apt-get install mosquitto)")
    return found


def start(config: Path, *, timeout_s: float = 10.0) -> subprocess.Popen[bytes]:
    """Start mosquitto with ``config`` and return when it accepts connections.

    Its log goes to ``mosquitto.log`` beside the configuration. Raises
    ``config.invalid`` with the end of that log when it does not come up.
    """
    log = config.parent / "mosquitto.log"
    host, port = listener(config)
    if _accepts(host, port):
        raise PitheadError("config.invalid", f"broker_port: something else listens on {host}:{port}")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [executable(), "-c", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if _accepts(host, port):
            return process
        time.sleep(0.02)
    stop(process)
    tail = log.read_text(errors="replace")[-2000:]
    raise PitheadError("config.invalid", f"mosquitto did not start with {config}:\n{tail}")


def _accepts(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def stop(process: subprocess.Popen[bytes], timeout_s: float = 10.0) -> None:
    """End a broker that ``start`` has started; it saves its state first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def listener(config: Path) -> tuple[str, int]:
    """Return an address at which the broker of ``config`` can be reached from this machine."""
    for line in config.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[:1] == ["listener"]:
            return (words[2] if words[2:] else "127.0.0.1"), int(words[1])
    raise PitheadError("config.invalid", f"{config} has no listener")


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _user_for(directory: Path) -> str | None:
    """Return the user that a broker started as root changes to.

    Its own where that user can reach the directory, else root itself:
    a broker that cannot read its own files would not start.
    """
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(BROKER_USER)
    except KeyError:
        return "root"
    reachable = all(parent.stat().st_mode & 0o001 for parent in directory.parents)
    return BROKER_USER if reachable else "root"


def _config(directory: Path, port: int, bind: str, user: str | None) -> str:
    lines = [
        "# Written by Pithead; changes are lost.",
        f"user {user}" if user else "# runs as whoever starts it",
        f"listener {port} {bind}".rstrip(),
        f"cafile {directory}/trusted.pem",
        f"certfile {directory}/server.pem",
        f"keyfile {directory}/server.key",
        f"crlfile {directory}/crl.pem",
        "tls_version tlsv1.2",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {directory}/acl",
        f"pid_file {directory}/data/{PID_FILE}",
        "persistence true",
        f"persistence_location {directory}/data/",
        "autosave_interval 5",
        "max_queued_messages 200000",
        f"max_queued_bytes {QUEUE_BYTES}",
        f"memory_limit {MEMORY_BYTES}",
        "max_inflight_messages 1000",
        f"max_packet_size {MESSAGE_LIMIT}",
        "set_tcp_nodelay true",
        "connection_messages false",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
    ]
    return "\n".join(lines) + "\n"
