"""One decoder, fed by libFuzzer: ``python tests/fuzz/harness.py TARGET CORPUS [libFuzzer's options]``.

Whatever comes, the decoder returns, or raises an error that the client is to
blame for and that has words. Everything else ends the run and is kept as a
file, which the same command replays when it is named after the corpus.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["agent.engine.serve", "contract"]):
    from agent.engine.serve import codec, grpc_calls, grpc_codec, grpc_templates, http, rest, tensors
    from agent.engine.serve.requests import InferResponse
    from contract import codec as wire
    from contract.errors import PitheadError
    from contract.messages import Desired, Envelope
    from contract.package import parse_manifest
from tests.fuzz import seeds

DOCUMENTS = ("rest", "contract")
DEEPER, DROPPED = 0.8, 0.1
INTERNAL = 500
FULL = 503


def _blames_the_client(error: PitheadError) -> None:
    assert rest.STATUS.get(error.code, INTERNAL) < INTERNAL, error
    assert grpc_calls.status_of(error) != "INTERNAL", error
    assert error.detail, error.code


def of_rest(data: bytes) -> None:
    """A body of REST; its first byte says how long the JSON part claims to be."""
    if not data:
        return
    header = None if data[0] == 0 else str(data[0] * 4 - 4).encode()
    for at_once in (False, True):
        try:
            request, wish = codec.decode("m", "", data[1:], header, at_once=at_once)
        except tensors.TooMuchAtOnceError:
            continue
        except PitheadError as error:
            _blames_the_client(error)
            continue
        codec.encode(InferResponse("m", "1", request.inputs, request.id), wish)


_templates = grpc_templates.Templates()


def of_grpc(data: bytes) -> None:
    """A ``ModelInferRequest``; what was learned of those before must change nothing."""
    results: list[Any] = []
    for decode in (grpc_codec.decode, _templates.decode, _templates.decode):
        try:
            request, wish = decode(data)
        except tensors.TooMuchAtOnceError:
            return
        except PitheadError as error:
            _blames_the_client(error)
            results.append(str(error))
        else:
            arrays = {name: (a.dtype, a.shape, a.tobytes()) for name, a in request.inputs.items()}
            results.append((request.model, request.id, arrays, request.outputs, wish))
            _templates.encode(InferResponse(request.model, "1", request.inputs, request.id), wish)
    assert results[0] == results[1] == results[2], results


class _Wire(asyncio.Transport):
    """A client that takes everything."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.said = bytearray()
        self.over = False

    def write(self, data: Any) -> None:
        self.said += data

    def writelines(self, parts: Any) -> None:
        self.said += b"".join(parts)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.over

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.over = True

    def close(self) -> None:
        self.over = True

    def abort(self) -> None:
        self.over = True


def _answer(request: http.Request, respond: http.Respond) -> None:
    respond(http.Response(200, b"%d" % len(request.body)))


async def _server() -> http.Server:
    return http.Server(_answer, rest.failure, http.Limits(body_bytes=2**16))


_loop = asyncio.new_event_loop()
_http = _loop.run_until_complete(_server())


def of_http(data: bytes) -> None:
    """What comes on a connection; its first byte says in which pieces."""
    if not data:
        return
    client, connection = _Wire(), _http.protocol()
    connection.connection_made(client)
    size = data[0] or len(data)
    for start in range(1, len(data), size):
        if client.over:
            break
        connection.data_received(data[start : start + size])
    if not client.over:
        connection.eof_received()
    connection.connection_lost(None)
    for status in _http.statuses:
        assert status < INTERNAL or status == FULL, bytes(client.said)
    assert not client.said or client.said.startswith(b"HTTP/1.1 "), bytes(client.said)
    assert (_http.held, len(_http.connections)) == (0, 0), (_http.held, _http.connections)


def of_contract(data: bytes) -> None:
    """A manifest, a document, and a batch in each of its encodings."""
    for read in (
        parse_manifest,
        lambda body: wire.decode(body, Desired),
        lambda body: wire.decode(body, Envelope),
        *(lambda body, kind=kind: wire.decode_batch(body, kind) for kind in seeds.CONTENT_TYPES),
    ):
        try:
            read(data)
        except PitheadError as error:
            assert error.code.startswith(("message.", "package.")), error  # noqa: PT017 - there is no pytest
            assert error.detail, error.code  # noqa: PT017


TARGETS: dict[str, Callable[[bytes], None]] = {
    "rest": of_rest,
    "http": of_http,
    "grpc": of_grpc,
    "contract": of_contract,
}


def _replaced(value: Any, random: Random) -> Any:
    """Return a document with one part of it, chosen at random, replaced, repeated or left out."""
    if isinstance(value, dict | list) and value and random.random() < DEEPER:
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        copy = value.copy()
        if random.random() < DROPPED:
            del copy[key]
        else:
            copy[key] = _replaced(value[key], random)
        return copy
    return [value, value] if random.random() < DROPPED else random.choice(seeds.VALUES)


def _mutated(data: bytes, most: int, seed: int) -> bytes:
    """Change a document as such every other time: changed bytes alone hardly get past its syntax."""
    random = Random(seed)  # noqa: S311 - the fuzzer says what is to come of it, so that it can say it again
    at = 1 if data[:1] == b"\0" else 0
    try:
        document = json.loads(data[at:]) if seed % 2 else None
    except (ValueError, RecursionError):
        document = None
    if document is None:
        return bytes(atheris.Mutate(data, len(data)))
    return (data[:at] + json.dumps(_replaced(document, random)).encode())[:most]


def main() -> None:
    """Fuzz one target, or replay the files that are named."""
    name, corpus, *options = sys.argv[1:]
    seeds.write(name, Path(corpus))
    more = {"custom_mutator": _mutated} if name in DOCUMENTS else {}
    words = Path(corpus).with_name("words")
    atheris.Setup(
        [sys.argv[0], corpus, f"-dict={words}", "-use_value_profile=1", *options], TARGETS[name], **more
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
