"""``ModelStreamInfer``: requests on one stream, answered in their order while later ones are read.

A request that fails is answered with ``error_message``, and the stream goes on. A client that sends
``triton_grpc_error: true`` in its metadata wants the stream to end with the status instead.
"""

import asyncio
from typing import Any, Final, NamedTuple

import grpc

from agent.engine.serve import grpc_codec, tensors
from agent.engine.serve.grpc_calls import words_of
from agent.engine.serve.grpc_codec import RAW, Wish
from agent.engine.serve.requests import InferResponse
from agent.engine.serve.service import Service
from contract.errors import PitheadError

AHEAD: Final = 64
"""Requests of one stream that are not answered; beyond them nothing is read from it."""


class _Asked(NamedTuple):
    """A request on its way."""

    answer: "asyncio.Future[InferResponse | PitheadError]"
    wish: Wish
    id: str


class Stream:
    """One stream. ``failed`` is what it is to end with, once ``run`` has returned."""

    def __init__(self, service: Service, context: Any, read_s: float, client: str, *, strict: bool) -> None:
        self._service, self._context, self._read_s, self._strict = service, context, read_s, strict
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._asked: asyncio.Queue[_Asked | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(AHEAD)
        self._reader = self._loop.create_task(self._read())
        self._writer = self._loop.create_task(self._write())
        self.failed: PitheadError | None = None

    async def run(self) -> None:
        """Return when the client has ended it and all is answered, or when ``failed`` is set."""
        try:
            await asyncio.wait({self._reader, self._writer}, return_when=asyncio.FIRST_COMPLETED)
            if not self._writer.done():
                self._asked.put_nowait(None)
                await asyncio.wait({self._writer})
            self._writer.result()
        except TimeoutError:
            self.failed = PitheadError("serve.timeout", f"no answer was read for {self._read_s} s")
        except PitheadError as error:
            self.failed = error
        finally:
            self._reader.cancel()
            self._writer.cancel()
            if self._reader.done() and not self._reader.cancelled():
                self._reader.exception()  # it can only say that the client is gone

    def end(self) -> None:
        """Read no more; what was read is still answered."""
        self.failed = PitheadError("serve.not_ready", "the server ends")
        self._reader.cancel()

    async def _read(self) -> None:
        while (data := await self._context.read()) is not grpc.aio.EOF:
            await self._room.acquire()
            self._asked.put_nowait(await self._ask(data))

    async def _ask(self, data: bytes) -> _Asked:
        future: asyncio.Future[InferResponse | PitheadError] = self._loop.create_future()

        def done(answer: InferResponse | PitheadError) -> None:
            if not future.done():
                future.set_result(answer)

        try:
            try:
                request, wish = grpc_codec.decode(data, at_once=True)
            except tensors.TooMuchAtOnceError:
                request, wish = await self._loop.run_in_executor(None, grpc_codec.decode, data)
        except PitheadError as error:
            done(error)
            return _Asked(future, RAW, grpc_codec.identity_of(data))
        request.client = self._client
        self._service.submit(request, done)
        return _Asked(future, wish, request.id)

    async def _write(self) -> None:
        while (asked := await self._asked.get()) is not None:
            answer = await asked.answer
            if not isinstance(answer, PitheadError):
                data = grpc_codec.encode_streamed(answer, asked.wish)
            elif self._strict:
                raise answer
            else:
                data = grpc_codec.encode_failure(words_of(answer), asked.id)
            async with asyncio.timeout(self._read_s):
                await self._context.write(data)
            self._room.release()
