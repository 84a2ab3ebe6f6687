"""Every call of KServe's ``InferenceGRPCClient``, and what its stubs add; see ``triton_grpc.py``."""

import asyncio
import json
import sys
import traceback

import grpc
import numpy as np
from kserve import InferenceGRPCClient
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import InferInput, InferRequest

URL = f"127.0.0.1:{sys.argv[1]}"
X = np.arange(64, dtype=np.float32).reshape(1, 64) / 64


def client():
    return InferenceGRPCClient(URL, retries=0)


def request(raw, model="autoencoder", **more):
    tensor = InferInput("input", [1, 64], "FP32")
    tensor.set_data_from_numpy(X, binary_data=raw)
    return InferRequest(model, [tensor], **more)


async def answer(asked):
    async with client() as c:
        return (await c.infer(asked)).outputs[0].as_numpy()


async def is_server_live():
    async with client() as c:
        assert await c.is_server_live() is True


async def is_server_ready():
    async with client() as c:
        assert await c.is_server_ready() is True


async def is_model_ready():
    async with client() as c:
        assert await c.is_model_ready("autoencoder") is True
        assert await c.is_model_ready("nothing") is False


async def infer_raw_and_typed():
    raw, typed = await answer(request(raw=True)), await answer(request(raw=False))
    assert raw.shape == (1, 64)
    assert np.allclose(raw, typed, rtol=1e-4, atol=1e-5)


async def infer_id_and_parameters():
    async with client() as c:
        asked = request(raw=True, request_id="abc", parameters={"recipe": "B", "n": 3, "b": True})
        assert (await c.infer(asked)).id == "abc"


async def metadata():
    async with grpc.aio.insecure_channel(URL) as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert (await stub.ServerMetadata(messages.ServerMetadataRequest())).name == "pithead"
        found = await stub.ModelMetadata(messages.ModelMetadataRequest(name="autoencoder"))
        assert list(found.inputs[0].shape) == [-1, 64]


async def load_and_unload():
    async with grpc.aio.insecure_channel(URL) as channel:
        stub = GRPCInferenceServiceStub(channel)
        name = "mean_over_rows"
        done = await stub.RepositoryModelUnload(messages.RepositoryModelUnloadRequest(model_name=name))
        assert (done.model_name, done.isUnloaded) == (name, True)
        done = await stub.RepositoryModelLoad(messages.RepositoryModelLoadRequest(model_name=name))
        assert (done.model_name, done.isLoaded) == (name, True)


async def errors():
    async with client() as c:
        try:
            await c.infer(request(raw=True, model="nothing"))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND
        else:
            raise AssertionError("it was not refused")


def main():
    results = {}
    for name, call in list(globals().items()):
        if asyncio.iscoroutinefunction(call) and name not in HELPERS:
            try:
                asyncio.run(call())
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
    print(json.dumps(results))


HELPERS = {"client", "request", "answer", "main"}

if __name__ == "__main__":
    main()
