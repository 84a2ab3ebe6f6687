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
        """Bytes that have come and are not asked yet, as they are counted."""
        self._ended = False
        self._busy = False
        """A message is taken apart in a thread; those behind it wait."""
        self._going = False
        self._later = False
        """It will go on after the others' turn."""
        self._partial = False
        """The deadline is that of a message which has not come whole."""
        self._failed: PitheadError | None = None
        """What it is to end with when all that was read is answered."""
        self._over = False
        self._until = bounds.NEVER if said.timeout_s is None else time.monotonic() + said.timeout_s
        self._wake_in(bounds.IDLE_S)

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
            self._go()

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
        self._go()

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

    # ---- asking and answering

    def _go(self) -> None:
        """Ask what has come and answer what is ready, until it is the others' turn."""
        if self._going or self._later or self._over:
            return
        self._going = True
        asked = given = 0
        try:
            while asked < AHEAD and not self._over:
                more = self._ask_what_came()
                answered = self._answer_what_is_ready()
                asked, given = asked + more, given + answered
                if not (more or answered):
                    break
        except PitheadError as error:
            self._failed = error
        except Exception as error:
            log.exception("grpc.failed")
            self._failed = PitheadError("internal.error", type(error).__name__)
        finally:
            self._going = False
        if asked >= AHEAD and not self._over:
            self._later = True
            self._handler.loop.call_soon(self._go_on)
        self._wait(moved=bool(asked or given))

    def _go_on(self) -> None:
        self._later = False
        self._go()

    def _wait(self, *, moved: bool) -> None:
        """See what is waited for, and how long that may take; end when nothing is."""
        if self._over:
            return
        stream = self._stream
        waits = bool(self._asked) or self._busy or (self._later and self._failed is None)
        if not waits and (self._failed is not None or (self._ended and not stream.unsent)):
            self._finish()
            return
        full = self._busy or self._later or len(self._asked) >= AHEAD
        if full:
            stream.hold = True
        elif stream.hold:
            stream.resume()
        if not full and self._held:
            if moved or not self._partial:
                self._wake_in(self._handler.limits.body_s)
            self._partial = True
            return
        self._partial = False
        if waits:
            stream.deadline = self._until
        elif moved:
            self._wake_in(bounds.IDLE_S)

    def _wake_in(self, seconds: float) -> None:
        self._stream.deadline = min(self._until, time.monotonic() + seconds)

    # ---- what is asked

    def _account(self) -> None:
        held, self._held = self._held, self._messages.waiting
        if self._held > held:
            self._handler.hold(self._held - held, self._stream.connection)
        else:
            self._handler.release(held - self._held)

    def _ask_what_came(self) -> int:
        """Ask for all messages that have come whole, as far as there is room; return how many."""
        count = 0
        while not self._busy and len(self._asked) < AHEAD and self._failed is None and not self._over:
            found = self._messages.next()
            if found is None:
                break
            count += 1
            self._account()
            self._ask(*found)
        return count

    def _ask(self, compressed: bool, data: bytes) -> None:  # noqa: FBT001 - of a pair
        asked = _Asked(len(data))
        self._asked.append(asked)
        try:
            self._client = self._handler.who(self._said).name  # its token may be known no more
        except PitheadError as error:
            asked.answer = self._failed = error
        try:
            self._handler.hold(asked.size, self._stream.connection)
        except PitheadError as error:
            asked.answer = asked.answer or error
        if asked.answer is not None:
            return
        if compressed:
            self._in_thread(asked, data, compressed=True)
            return
        try:
            request, asked.wish = self._handler.templates.decode(data)
        except tensors.TooMuchAtOnceError:
            self._in_thread(asked, data, compressed=False)
        except PitheadError as error:
            asked.id, asked.answer = grpc_codec.identity_of(data), error
        except Exception as error:
            log.exception("grpc.failed")
            asked.answer = PitheadError("internal.error", type(error).__name__)
        else:
            self._submit(asked, request)

    def _in_thread(self, asked: _Asked, data: bytes, *, compressed: bool) -> None:
        def failed(error: PitheadError) -> None:
            self._busy = False
            asked.answer = error
            self._go()

        self._busy = True
        self._handler.later(self._taken_apart(asked, data, compressed=compressed), failed)

    async def _taken_apart(self, asked: _Asked, data: bytes, *, compressed: bool) -> None:
        handler = self._handler
        run = handler.loop.run_in_executor
        try:
            async with handler.large:
                if compressed:
                    encoding, most = self._said.encoding, handler.limits.body_bytes
                    data = await run(None, grpc_wire.inflated, data, encoding, most)
                    self._account_more(asked, len(data) - asked.size)
                request, asked.wish = await run(None, grpc_codec.decode, data)
        except PitheadError as error:
            asked.id, asked.answer = grpc_codec.identity_of(data), error
        else:
            if not self._over:
                self._submit(asked, request)
        self._busy = False
        self._go()

    def _account_more(self, asked: _Asked, size: int) -> None:
        """Count what a message has become by being inflated."""
        if not self._over:
            asked.size += size
            self._handler.hold(size, self._stream.connection)

    def _submit(self, asked: _Asked, request: InferRequest) -> None:
        asked.id, request.client = request.id, self._client
        self._handler.hurry(request, self._until)

        def done(answer: InferResponse | PitheadError) -> None:
            asked.answer = answer
            if self._asked and self._asked[0] is asked:
                self._go()

        try:
            self._handler.service.submit(request, done)
        except Exception as error:
            log.exception("grpc.failed")
            done(PitheadError("internal.error", type(error).__name__))

    # ---- what is answered

    def _answer_what_is_ready(self) -> int:
        """Answer in order what can be answered, as long as the client reads it; return how many."""
        count, stream = 0, self._stream
        while self._asked and stream.open and not stream.unsent:
            asked = self._asked[0]
            if asked.answer is None:
                break
            count += 1
            self._asked.popleft()
            self._handler.release(asked.size)
            self._answer(asked, asked.answer)
        return count

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

    # ---- how it ends

    def _fail(self, error: PitheadError) -> None:
        if self._failed is None:
            self._failed = error
        self._go()

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
