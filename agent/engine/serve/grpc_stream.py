"""``ModelStreamInfer``: requests on one stream, answered in their order while later ones are read.

A request that fails is answered with ``error_message``, and the stream goes on. A client that sends
``triton_grpc_error: true`` in its metadata wants the stream to end with the status instead.
"""

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from agent.engine.serve import grpc_codec, grpc_wire, tensors
from agent.engine.serve import http2_bounds as bounds
from agent.engine.serve.grpc_calls import words_of
from agent.engine.serve.grpc_codec import RAW, Wish
from agent.engine.serve.grpc_wire import Head
from agent.engine.serve.http2_stream import Stream
from agent.engine.serve.requests import InferRequest, InferResponse
from contract.errors import PitheadError

if TYPE_CHECKING:
    from agent.engine.serve.grpc_server import Handler

log = logging.getLogger(__name__)

AHEAD: Final = 64
"""Requests of one stream that are not answered; beyond them nothing is read from it."""


class _Asked:
    """A request on its way."""

    __slots__ = ("answer", "id", "size", "wish")

    def __init__(self, size: int) -> None:
        self.answer: InferResponse | PitheadError | None = None
        self.wish: Wish = RAW
        self.id = ""
        self.size = size


class Streamed:
    """One stream. See ``http2_stream.Receiver``."""

    def __init__(self, handler: "Handler", stream: Stream, said: Head, client: str) -> None:
        self._handler, self._stream, self._said, self._client = handler, stream, said, client
        self._messages = grpc_wire.Messages(handler.limits.body_bytes)
        self._asked: deque[_Asked] = deque()
        self._held = 0
        """Bytes of a message that has not come whole, as they are counted."""
        self._ended = False
        self._busy = False
        """A message is taken apart in a thread; those behind it wait."""
        self._giving = False
        self._failed: PitheadError | None = None
        """What it is to end with when all that was read is answered."""
        self._over = False
        self._until = bounds.NEVER if said.timeout_s is None else time.monotonic() + said.timeout_s
        stream.deadline = min(self._until, time.monotonic() + bounds.IDLE_S)

    def data(self, payload: bytes, *, ended: bool) -> None:
        """Take a piece of what the client sends."""
        if self._failed is not None or self._over:
            return
        self._ended = ended
        try:
            self._messages.feed(payload)
            self._account()
        except PitheadError as error:
            self._fail(error)
        else:
            self._read()

    def lost(self) -> None:
        """The client does not wait."""
        self._close()

    def overdue(self) -> None:
        """The client's deadline is over, or no message came in time, or not the rest of one."""
        over = time.monotonic() > self._until
        words = "the deadline is over" if over else "no message arrived in time"
        self._handler.refuse(self._stream, PitheadError("serve.timeout", words))
        self._close()

    def drained(self) -> None:
        """What was answered is read: go on."""
        self._give()

    def end(self) -> None:
        """Read no more; what was read is still answered."""
        self._fail(PitheadError("serve.not_ready", "the server ends"))

    def check(self) -> None:
        """End if the token is known no more: who keeps silent is not asked for it."""
        if self._failed is None and not self._over:
            try:
                self._handler.who(self._said)
            except PitheadError as error:
                self._fail(error)

    # ---- what is asked

    def _account(self) -> None:
        held, self._held = self._held, self._messages.waiting
        self._handler.release(held)
        limits = self._handler.limits
        if not self._held:
            self._stream.deadline = self._until
        elif not held:
            self._stream.deadline = min(self._until, time.monotonic() + limits.body_s)
        self._handler.hold(self._held, self._stream.connection)

    def _read(self) -> None:
        """Ask for all messages that have come whole, as far as there is room, and answer what can be."""
        try:
            self._read_on()
        except PitheadError as error:
            self._fail(error)
        except Exception as error:
            log.exception("grpc.failed")
            self._fail(PitheadError("internal.error", type(error).__name__))
        else:
            self._give()

    def _read_on(self) -> None:
        while not self._busy and len(self._asked) < AHEAD and self._failed is None and not self._over:
            found = self._messages.next()
            if found is None:
                break
            self._account()
            self._ask(*found)
        full = self._busy or len(self._asked) >= AHEAD
        if full:
            self._stream.hold = True
            self._stream.deadline = self._until
        elif self._stream.hold:
            self._stream.resume()

    def _ask(self, compressed: bool, data: bytes) -> None:  # noqa: FBT001 - of a pair
        asked = _Asked(len(data))
        self._asked.append(asked)
        try:
            self._handler.hold(asked.size, self._stream.connection)
            self._client = self._handler.who(self._said).name  # its token may be known no more
        except PitheadError as error:
            asked.answer = self._failed = error
            return
        if compressed:
            self._busy = True
            self._handler.later(self._in_thread(asked, data, compressed=True), self._fail)
            return
        try:
            request, asked.wish = self._handler.templates.decode(data)
        except tensors.TooMuchAtOnceError:
            self._busy = True
            self._handler.later(self._in_thread(asked, data, compressed=False), self._fail)
        except PitheadError as error:
            asked.id, asked.answer = grpc_codec.identity_of(data), error
        else:
            self._submit(asked, request)

    async def _in_thread(self, asked: _Asked, data: bytes, *, compressed: bool) -> None:
        handler = self._handler
        run = handler.loop.run_in_executor
        try:
            async with handler.large:
                if compressed:
                    encoding, most = self._said.encoding, handler.limits.body_bytes
                    data = await run(None, grpc_wire.inflated, data, encoding, most)
                request, asked.wish = await run(None, grpc_codec.decode, data)
        except PitheadError as error:
            asked.id, asked.answer = grpc_codec.identity_of(data), error
        else:
            if not self._over:
                self._submit(asked, request)
        self._busy = False
        if not self._over:
            self._read()

    def _submit(self, asked: _Asked, request: InferRequest) -> None:
        asked.id, request.client = request.id, self._client
        self._handler.hurry(request, self._until)

        def done(answer: InferResponse | PitheadError) -> None:
            asked.answer = answer
            if not self._giving and self._asked and self._asked[0] is asked:
                self._give()

        self._giving, before = True, self._giving
        try:
            self._handler.service.submit(request, done)
        finally:
            self._giving = before

    # ---- what is answered

    def _give(self) -> None:
        """Answer in order what can be answered, as long as the client reads it."""
        if self._giving or self._over:
            return
        self._giving = True
        try:
            before = len(self._asked)
            stream = self._stream
            while self._asked and stream.open and not stream.unsent and not stream.connection.unread:
                asked = self._asked[0]
                if asked.answer is None:
                    break
                self._asked.popleft()
                self._handler.release(asked.size)
                self._answer(asked, asked.answer)
        finally:
            self._giving = False
        if self._over or self._asked:
            pass
        elif self._failed is not None or self._whole():
            self._finish()
        elif before:
            wait = self._handler.limits.body_s if self._held else bounds.IDLE_S
            stream.deadline = min(self._until, time.monotonic() + wait)
        if before >= AHEAD > len(self._asked) and not self._over:
            self._read()

    def _whole(self) -> bool:
        return self._ended and not self._busy and not self._stream.unsent

    def _answer(self, asked: _Asked, answer: InferResponse | PitheadError) -> None:
        if not isinstance(answer, PitheadError):
            data = self._encoded(asked, answer)
        elif self._said.strict or answer is self._failed:
            self._failed = answer
            for left in self._asked:
                self._handler.release(left.size)
            self._asked.clear()
            return
        else:
            data = grpc_codec.encode_failure(words_of(answer), asked.id)
        self._stream.send(grpc_wire.framed(data))

    def _encoded(self, asked: _Asked, answer: InferResponse) -> bytes:
        try:
            return grpc_codec.encode_streamed(answer, asked.wish)
        except PitheadError as error:
            return grpc_codec.encode_failure(words_of(error), asked.id)
        except Exception as error:
            log.exception("grpc.failed")
            internal = PitheadError("internal.error", type(error).__name__)
            return grpc_codec.encode_failure(words_of(internal), asked.id)

    def _fail(self, error: PitheadError) -> None:
        if self._failed is None:
            self._failed = error
        self._busy = False
        self._give()

    def _finish(self) -> None:
        failed = self._failed
        if failed is None and self._messages.waiting:
            failed = PitheadError("serve.bad_request", "the last message is not whole")
        if failed is not None:
            self._handler.refuse(self._stream, failed)
        else:
            self._handler.count("OK")
            self._stream.send(b"", grpc_wire.OK)
        self._close()

    def _close(self) -> None:
        if self._over:
            return
        self._over = True
        self._handler.release(self._held + sum(asked.size for asked in self._asked))
        self._held = 0
        self._asked.clear()
        self._handler.forget(self)
