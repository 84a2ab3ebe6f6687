"""pytriton's clients over gRPC, against a server of ours; see ``triton_grpc.py``.

``FuturesModelClient`` is not among them: its workers ask over HTTP whatever the address says.
"""

import asyncio
import json
import sys
import traceback

import numpy as np
from pytriton.client import AsyncioModelClient, ModelClient
from pytriton.client.exceptions import PyTritonClientInferenceServerError

URL = f"grpc://127.0.0.1:{sys.argv[1]}"
X = np.arange(64, dtype=np.float32) / 64


def wait_for_server_and_model():
    with ModelClient(URL, "autoencoder", lazy_init=True) as c:
        c.wait_for_server(10)
        c.wait_for_model(10)


def model_config():
    with ModelClient(URL, "autoencoder") as c:
        assert c.model_config.max_batch_size == 64
        assert c.model_config.inputs[0].shape == (64,)
        assert c.is_batching_supported


def infer_sample_and_batch():
    with ModelClient(URL, "autoencoder") as c:
        got = c.infer_batch(np.stack([X, 2 * X]))["output"]
        one = c.infer_sample(input=X, parameters={"recipe": "B"})["output"]
        assert np.allclose(got[0], one, rtol=1e-4, atol=1e-5)


def asyncio_client():
    async def work():
        async with AsyncioModelClient(URL, "autoencoder") as c:
            return await asyncio.gather(*(c.infer_sample(X) for _ in range(10)))

    assert all(r["output"].shape == (64,) for r in asyncio.run(work()))


def load_and_unload():
    with ModelClient(URL, "mean_over_rows", ensure_model_is_ready=False, lazy_init=True) as c:
        c.unload_model()
        c.load_model()
        c.wait_for_model(10)


def errors():
    with ModelClient(URL, "autoencoder") as c:
        try:
            c.infer_sample(X[:5])
        except PyTritonClientInferenceServerError as error:
            assert "shape" in str(error)
        else:
            raise AssertionError("it was not refused")


def main():
    results = {}
    for name, call in list(globals().items()):
        if callable(call) and getattr(call, "__module__", "") == "__main__" and name not in HELPERS:
            try:
                call()
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
    print(json.dumps(results))


HELPERS = {"main"}

if __name__ == "__main__":
    main()
