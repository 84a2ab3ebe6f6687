"""A plain client over gRPC, of the project's own messages, that shows every status."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from agent.engine.serve.proto.messages import CLASSES, SERVICE

DEADLINE_S = 30.0
ONE = np.arange(64, dtype=np.float32).reshape(1, 64) / 64


def message(x: Any = ONE, model: str = "autoencoder", name: str = "input", **more: Any) -> Any:
    made = CLASSES["ModelInferRequest"](model_name=model, **more)
    made.inputs.add(name=name, datatype="FP32", shape=x.shape)
    made.raw_input_contents.append(x.tobytes())
    return made


def array(answer: Any, at: int = 0) -> np.ndarray[Any, Any]:
    return np.frombuffer(answer.raw_output_contents[at], np.float32).reshape(answer.outputs[at].shape)


class Client:
    """One channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel

    def call(
        self, name: str, said: Any = None, *, metadata: Any = None, timeout: float = DEADLINE_S, **more: Any
    ):
        said = CLASSES[f"{name}Request"]() if said is None else said
        data = said if isinstance(said, bytes) else said.SerializeToString()
        ask = self.channel.unary_unary(f"/{SERVICE}/{name}")
        return CLASSES[f"{name}Response"].FromString(ask(data, metadata=metadata, timeout=timeout, **more))

    def ask(self, call: str, /, **fields: Any):
        return self.call(call, CLASSES[f"{call}Request"](**fields))

    def infer(self, said: Any = None, **more: Any):
        return self.call("ModelInfer", message() if said is None else said, **more)

    def stream(
        self, said: Iterable[bytes], metadata: Any = None, timeout: float | None = DEADLINE_S
    ) -> Iterator[Any]:
        ask = self.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        for data in ask(iter(said), metadata=metadata, timeout=timeout):
            yield CLASSES["ModelStreamInferResponse"].FromString(data)

    def refused(
        self, said: Any, code: grpc.StatusCode, words: str = "", call: str = "ModelInfer", **more: Any
    ):
        with pytest.raises(grpc.RpcError) as caught:
            self.call(call, said, **more)
        error = caught.value
        assert (error.code(), words in error.details()) == (code, True), (error.code(), error.details())
        return error


@contextmanager
def client(port: int, credentials: Any = None, **options: Any) -> Iterator[Client]:
    target, known = f"127.0.0.1:{port}", [(f"grpc.{k}", v) for k, v in options.items()]
    # Each channel a connection of its own, as separate clients have.
    known.append(("grpc.use_local_subchannel_pool", 1))
    if credentials is None:
        channel = grpc.insecure_channel(target, known)
    else:
        channel = grpc.secure_channel(target, credentials, known)
    with channel:
        yield Client(channel)
