"""Put a service and its listeners together on one event loop, in the main thread or in one of its own."""

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct
from msgspec.structs import replace

from agent.engine.serve import http, rest
from agent.engine.serve.catalogue import Limits
from agent.engine.serve.handshakes import Listener
from agent.engine.serve.hosts import Hosts
from agent.engine.serve.repository import Source
from agent.engine.serve.service import Service
from agent.engine.serve.shared_memory import SharedMemory, owners
from agent.engine.serve.tokens import Tokens
from contract.errors import PitheadError

if TYPE_CHECKING:
    from agent.engine.serve import grpc_server

log = logging.getLogger(__name__)

BACKLOG: Final = 512
DRAIN_S: Final = 5.0


class Listen(Struct, frozen=True):
    """Where and for whom to listen."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    """0 takes a free one."""
    grpc_port: int | None = None
    """None: no gRPC, and nothing of it in memory; 0 takes a free one."""
    certificate: Path | None = None
    key: Path | None = None
    limits: http.Limits = http.Limits()
    names: tuple[str, ...] = ()
    """What it may be called in ``Host``, beside loopback and addresses, where no token is asked for."""
    shared_memory_users: tuple[str, ...] = ()
    """Whose regions of shared memory are taken, beside those of the user that this process runs as."""


class App:
    """A running server. Made and used on its loop's thread."""

    def __init__(
        self,
        sources: Sequence[Source],
        limits: Limits,
        listen: Listen,
        tokens: Tokens | None,
        service: type[Service] = Service,
    ) -> None:
        local = is_loopback(listen.host)
        if not local and tokens is None:
            raise PitheadError(
                "config.invalid",
                f"--host {listen.host} is not loopback: give --token-file, so that not everybody may ask",
            )
        self.listen, self.tokens = listen, tokens
        memory = SharedMemory(owners=owners(listen.shared_memory_users)) if local else SharedMemory(None)
        self.service = service(sources, limits, memory)
        self.rest = rest.Rest(
            self.service, tokens, listen.limits.body_bytes, Hosts((listen.host, *listen.names))
        )
        self.http: http.Server | None = None
        self.port = 0
        self.grpc: grpc_server.Server | None = None
        self._server: asyncio.Server | Listener | None = None
        self._context: ssl.SSLContext | None = None

    async def start(self) -> None:
        """Listen, then begin to load; raises ``config.invalid`` and ``serve.repository_unreadable``."""
        listen = self.listen
        self.http = http.Server(self.rest.handle, rest.failure, _fitting(listen.limits))
        self.rest.shows(self.http)
        self._context = _tls(listen)
        loop = asyncio.get_running_loop()
        try:
            if self._context is None:
                self._server = await loop.create_server(
                    self.http.protocol, listen.host, listen.http_port, backlog=BACKLOG
                )
                self.port = self._server.sockets[0].getsockname()[1]
            else:
                self._server = Listener(_listening(listen), self.http, self._context)
                self.port = self._server.port
        except OSError as error:
            raise PitheadError(
                "config.invalid", f"cannot listen on {listen.host}:{listen.http_port}: {error}"
            ) from error
        if listen.grpc_port is not None:
            self.grpc = await _grpc(self.service, self.tokens, listen, listen.grpc_port)
        await self.service.start()

    async def stop(self) -> None:
        """Take no more, answer what is there, end."""
        if self._server is not None:
            self._server.close()
        ends = [] if self.http is None else [self.http.close(DRAIN_S)]
        if self.grpc is not None:
            ends.append(self.grpc.stop(DRAIN_S))
        await asyncio.gather(*ends)
        await self.service.stop()

    def renew_certificate(self) -> None:
        """Show the certificate that is in the files now to whoever connects over REST from here on.

        Raises ``config.invalid`` where it cannot be read, and goes on with the one before.
        """
        if self._context is not None and _tls(self.listen) is not None:
            self._context.load_cert_chain(self.listen.certificate or "", self.listen.key)

    @property
    def url(self) -> str:
        """Where REST is."""
        return f"{'https' if self.listen.certificate else 'http'}://{self._host}:{self.port}"

    @property
    def grpc_address(self) -> str:
        """Where gRPC is; empty where it is not."""
        return "" if self.grpc is None else f"{self._host}:{self.grpc.port}"

    @property
    def _host(self) -> str:
        return f"[{self.listen.host}]" if ":" in self.listen.host else self.listen.host


class ServingThread:
    """An app in a thread of its own, for a process that has other things to do.

    Offer models through a ``repository.Memory`` source and ``load`` or ``unload``.
    """

    def __init__(
        self, sources: Sequence[Source], limits: Limits, listen: Listen, tokens: Tokens | None
    ) -> None:
        self._make = partial(App, sources, limits, listen, tokens)
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)
        self._up = threading.Event()
        self._failure: PitheadError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.app: App | None = None

    def start(self) -> App:
        """Return when it listens; raises what ``App.start`` raises."""
        self._thread.start()
        self._up.wait()
        if self._failure is not None:
            raise self._failure
        assert self.app is not None
        return self.app

    def load(self, name: str, timeout_s: float = 60.0) -> None:
        """Load a model's newest version and let it take its place; raises what ``Service.load`` raises."""
        assert self.app is not None
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self.app.service.load(name), self._loop).result(timeout_s)

    def unload(self, name: str) -> None:
        """Serve a model no more."""
        assert self.app is not None
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.app.service.unload, name)

    def stop(self, timeout_s: float = 15.0) -> None:
        """End, and wait for it."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        run(self._main())

    async def _main(self) -> None:
        try:
            self.app = self._make()
            await self.app.start()
        except PitheadError as error:
            self._failure = error
            return
        finally:
            self._loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            self._up.set()
        await self._stop.wait()
        await self.app.stop()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on uvloop where it is installed, else on asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name counts if all of its addresses do."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    addresses = {str(address[4][0]) for address in found}
    return bool(addresses) and all(a == "::1" or a.startswith("127.") for a in addresses)


def _fitting(limits: http.Limits) -> http.Limits:
    """Return limits that this process's descriptors suffice for."""
    import resource  # noqa: PLC0415 - not on every platform that can import this module

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + 200
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return replace(limits, connections=max(1, most - 200))
    return limits


def _listening(listen: Listen) -> list[socket.socket]:
    """Return sockets that listen on the addresses of the host; raises ``OSError``."""
    found = socket.getaddrinfo(
        listen.host, listen.http_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listening: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            sock = socket.create_server(address[:2], family=family, backlog=BACKLOG)
            sock.setblocking(False)
            listening.append(sock)
    except OSError:
        for sock in listening:
            sock.close()
        raise
    return listening


async def _grpc(service: Service, tokens: Tokens | None, listen: Listen, port: int) -> "grpc_server.Server":
    try:
        from agent.engine.serve import grpc_server  # noqa: PLC0415 - protobuf and hpack only for those who ask for it
    except ImportError as error:
        raise PitheadError("config.invalid", f"--grpc-port: install pithead[serve]: {error}") from error
    where = grpc_server.Listen(listen.host, port, _fitting(listen.limits), _tls(listen))
    server = grpc_server.Server(service, tokens, where)
    await server.start()
    return server


def _tls(listen: Listen) -> ssl.SSLContext | None:
    if listen.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(listen.certificate, listen.key)
    except (OSError, ssl.SSLError) as error:
        raise PitheadError("config.invalid", f"--tls-cert {listen.certificate}: {error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context
