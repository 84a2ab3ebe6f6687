"""Every call of pytriton's clients over HTTP, against a server of ours; see ``triton_http.py``."""

import asyncio
import json
import sys
import traceback

import numpy as np
from pytriton.client import AsyncioModelClient, FuturesModelClient, ModelClient
from pytriton.client.exceptions import (
    PyTritonClientInferenceServerError,
    PyTritonClientModelDoesntSupportBatchingError,
)

URL = f"http://127.0.0.1:{sys.argv[1]}"
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


def infer_sample():
    with ModelClient(URL, "autoencoder") as c:
        assert c.infer_sample(X)["output"].shape == (64,)
        assert c.infer_sample(input=X, parameters={"recipe": "B"})["output"].shape == (64,)


def infer_batch():
    with ModelClient(URL, "autoencoder") as c:
        got = c.infer_batch(np.stack([X, 2 * X]))["output"]
        assert np.allclose(got[0], c.infer_sample(X)["output"], rtol=1e-4, atol=1e-5)


def infer_without_batching():
    a = np.arange(16, dtype=np.int32).reshape(1, 16)
    with ModelClient(URL, "add_sub") as c:
        assert np.array_equal(c.infer_sample(a, a)["OUTPUT0"], 2 * a)
        try:
            c.infer_batch(a, a)
        except PyTritonClientModelDoesntSupportBatchingError:
            pass
        else:
            raise AssertionError("it was not refused")


def futures():
    with FuturesModelClient(URL, "autoencoder", max_workers=4) as c:
        waiting = [c.infer_sample(X) for _ in range(20)]
        assert all(w.result()["output"].shape == (64,) for w in waiting)


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
