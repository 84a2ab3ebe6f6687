"""Every call of KServe's ``InferenceRESTClient``, against a server of ours; see ``triton_http.py``."""

import asyncio
import json
import sys
import traceback

import httpx
import numpy as np
from kserve import InferenceRESTClient, RESTConfig
from kserve.protocol.infer_type import InferInput, InferRequest, RequestedOutput

URL = f"http://127.0.0.1:{sys.argv[1]}"
X = np.arange(64, dtype=np.float32).reshape(1, 64) / 64


def client():
    return InferenceRESTClient(RESTConfig(protocol="v2", retries=0))


def request(binary, **more):
    tensor = InferInput("input", [1, 64], "FP32")
    tensor.set_data_from_numpy(X, binary_data=binary)
    return InferRequest("autoencoder", [tensor], **more)


async def answer(asked):
    async with client() as c:
        reply = await c.infer(URL, asked, model_name="autoencoder")
        return reply.outputs[0].as_numpy()


async def is_server_live():
    async with client() as c:
        assert await c.is_server_live(URL) is True


async def is_server_ready():
    async with client() as c:
        assert await c.is_server_ready(URL) is True


async def is_model_ready():
    async with client() as c:
        assert await c.is_model_ready(URL, "autoencoder") is True
        assert await c.is_model_ready(URL, "nothing") is False


async def infer_json():
    assert (await answer(request(binary=False))).shape == (1, 64)


async def infer_binary():
    got = await answer(
        request(binary=True, request_outputs=[RequestedOutput("output", {"binary_data": True})])
    )
    assert np.allclose(got, await answer(request(binary=False)), rtol=1e-4, atol=1e-5)


async def infer_dictionary():
    body = {"inputs": [{"name": "input", "shape": [1, 64], "datatype": "FP32", "data": X.tolist()}]}
    assert (await answer(body)).shape == (1, 64)


async def errors():
    async with client() as c:
        try:
            await c.infer(URL, request(binary=False), model_name="nothing")
        except httpx.HTTPStatusError as error:
            assert error.response.status_code == 404
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
