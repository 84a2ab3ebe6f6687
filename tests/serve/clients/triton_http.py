"""Every call of ``tritonclient.http``, against a server of ours. Runs in the client's own environment.

Prints one JSON object: the name of each call, and what was wrong with it (null where it was right).
"""

import json
import sys
import traceback

import numpy as np
import tritonclient.utils.shared_memory as shm
from tritonclient import http
from tritonclient.utils import InferenceServerException

URL = f"127.0.0.1:{sys.argv[1]}"
X = np.arange(64, dtype=np.float32).reshape(1, 64) / 64


def client(**options):
    return http.InferenceServerClient(URL, **options)


def inputs(binary=True, x=X, name="input", datatype="FP32"):
    tensor = http.InferInput(name, list(x.shape), datatype)
    tensor.set_data_from_numpy(x, binary_data=binary)
    return [tensor]


def reference():
    return client().infer("autoencoder", inputs()).as_numpy("output")


def refused(call, status, words):
    try:
        call()
    except InferenceServerException as error:
        assert str(error.status()) == str(status), (error.status(), error.message())
        assert words in error.message(), error.message()
    else:
        raise AssertionError("it was not refused")


def server_live():
    assert client().is_server_live()


def server_ready():
    assert client().is_server_ready()


def model_ready():
    assert client().is_model_ready("autoencoder")
    assert client().is_model_ready("add_sub", "3")
    assert not client().is_model_ready("nothing")


def server_metadata():
    found = client().get_server_metadata()
    assert found["name"] == "pithead"
    assert "binary_tensor_data" in found["extensions"]


def model_metadata():
    found = client().get_model_metadata("add_sub")
    assert found["versions"] == ["3"], found
    assert found["inputs"][1] == {"name": "INPUT1", "datatype": "INT32", "shape": [1, 16]}, found
    assert client().get_model_metadata("autoencoder", "1")["outputs"][0]["shape"] == [-1, 64]


def model_config():
    found = client().get_model_config("autoencoder")
    assert found["max_batch_size"] > 1
    assert found["input"][0] == {"name": "input", "data_type": "TYPE_FP32", "dims": [64]}, found


def infer_binary():
    answer = client().infer("autoencoder", inputs(), outputs=[http.InferRequestedOutput("output")])
    assert answer.as_numpy("output").shape == (1, 64)
    assert answer.get_response()["model_version"] == "1"


def infer_json():
    answer = client().infer(
        "autoencoder", inputs(binary=False), outputs=[http.InferRequestedOutput("output", binary_data=False)]
    )
    assert np.array_equal(answer.as_numpy("output"), reference())


def infer_mixed():
    two = [http.InferInput(f"INPUT{i}", [1, 16], "INT32") for i in range(2)]
    a = np.arange(16, dtype=np.int32).reshape(1, 16)
    two[0].set_data_from_numpy(a, binary_data=True)
    two[1].set_data_from_numpy(a * 2, binary_data=False)
    wanted = [
        http.InferRequestedOutput("OUTPUT1", binary_data=True),
        http.InferRequestedOutput("OUTPUT0", binary_data=False),
    ]
    answer = client().infer("add_sub", two, outputs=wanted)
    assert np.array_equal(answer.as_numpy("OUTPUT0"), 3 * a)
    assert np.array_equal(answer.as_numpy("OUTPUT1"), -a)


def infer_version_and_id():
    answer = client().infer("autoencoder", inputs(), model_version="1", request_id="abc")
    assert answer.get_response()["id"] == "abc"


def infer_async():
    with client(concurrency=4) as c:
        waiting = [c.async_infer("autoencoder", inputs(x=X * i)) for i in range(20)]
        for i, one in enumerate(waiting):
            got = one.get_result().as_numpy("output")
            want = c.infer("autoencoder", inputs(x=X * i)).as_numpy("output")
            assert np.allclose(got, want, rtol=1e-4, atol=1e-5)


def infer_compressed():
    for algorithm in ("gzip", "deflate"):
        answer = client().infer(
            "autoencoder",
            inputs(x=np.repeat(X, 8, axis=0)),
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert np.allclose(answer.as_numpy("output"), reference(), rtol=1e-4, atol=1e-5)


def infer_parameters():
    answer = client().infer(
        "autoencoder", inputs(), priority=1, timeout=5_000_000, parameters={"recipe": "B", "n": 3, "b": True}
    )
    assert answer.as_numpy("output").shape == (1, 64)


def every_datatype():
    random = np.random.default_rng(0)
    kinds = {
        "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
        "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
        "FP32": np.float32, "FP64": np.float64,
    }  # fmt: skip
    arrays = {d: random.integers(0, 2, (2, 3)).astype(t) for d, t in kinds.items()}
    for binary in (True, False):
        given = []
        for d, array in arrays.items():
            tensor = http.InferInput(f"in_{d}", [2, 3], d)
            tensor.set_data_from_numpy(array, binary_data=binary or d == "FP16")
            given.append(tensor)
        wanted = [http.InferRequestedOutput(f"out_{d}", binary_data=binary or d == "FP16") for d in kinds]
        answer = client().infer("every_type", given, outputs=wanted)
        for d, array in arrays.items():
            got = answer.as_numpy(f"out_{d}")
            assert (got.dtype, np.array_equal(got, array)) == (array.dtype, True), d


def texts():
    given = np.array([b"pump", "Ger\u00e4t".encode(), b""], np.object_)
    for binary in (True, False):
        answer = client().infer(
            "texts",
            inputs(binary=binary, x=given, name="text", datatype="BYTES"),
            outputs=[http.InferRequestedOutput("same", binary_data=binary)],
        )
        got = [t if isinstance(t, bytes) else t.encode() for t in answer.as_numpy("same")]
        assert got == given.tolist(), got


def classification():
    wanted = [http.InferRequestedOutput("OUTPUT0", class_count=2)]
    a = np.arange(16, dtype=np.int32).reshape(1, 16)
    two = [*inputs(x=a, name="INPUT0", datatype="INT32"), *inputs(x=a, name="INPUT1", datatype="INT32")]
    found = client().infer("add_sub", two, outputs=wanted).as_numpy("OUTPUT0")
    assert found.ravel().tolist() == [b"30:15", b"28:14"], found
    found = client().infer("add_sub", two[:1] + inputs(x=-a, name="INPUT1", datatype="INT32"), outputs=wanted)
    assert found.as_numpy("OUTPUT0").ravel().tolist() == [b"0:0:zero", b"0:1:one"], found.as_numpy("OUTPUT0")
    batch = client().infer(
        "autoencoder",
        inputs(x=np.repeat(X, 2, axis=0)),
        outputs=[http.InferRequestedOutput("output", class_count=3)],
    )
    assert batch.as_numpy("output").shape == (2, 3)


def statistics():
    before = client().get_inference_statistics("autoencoder")["model_stats"][0]
    client().infer("autoencoder", inputs(x=np.repeat(X, 3, axis=0)))
    after = client().get_inference_statistics("autoencoder", "1")["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 3
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert after["last_inference"] > 0
    assert len(client().get_inference_statistics()["model_stats"]) >= 5


def trace_settings():
    c = client()
    assert c.get_trace_settings()["trace_level"] == ["OFF"]
    assert (
        c.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"], "trace_rate": "5"})["trace_rate"]
        == "5"
    )
    assert c.get_trace_settings("autoencoder")["trace_level"] == ["TIMESTAMPS"]
    c.update_trace_settings("autoencoder", {"trace_rate": "7"})
    assert c.get_trace_settings("autoencoder")["trace_rate"] == "7"
    c.update_trace_settings(settings={"trace_level": None, "trace_rate": None})
    assert c.get_trace_settings()["trace_rate"] == "1000"
    refused(lambda: c.update_trace_settings(settings={"trace_file": "/etc/passwd"}), 400, "trace_file")


def log_settings():
    c = client()
    assert c.get_log_settings()["log_info"] is True
    assert c.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
    assert c.update_log_settings({"log_verbose_level": 0})["log_verbose_level"] == 0
    refused(lambda: c.update_log_settings({"log_file": "/tmp/x"}), 400, "log_file")


def system_shared_memory():
    c = client()
    c.unregister_system_shared_memory()
    given = shm.create_shared_memory_region("in", "/pithead_test_in", 256)
    taken = shm.create_shared_memory_region("out", "/pithead_test_out", 256)
    try:
        shm.set_shared_memory_region(given, [X])
        c.register_system_shared_memory("in", "/pithead_test_in", 256)
        c.register_system_shared_memory("out", "/pithead_test_out", 256)
        assert {r["name"] for r in c.get_system_shared_memory_status()} == {"in", "out"}
        assert c.get_system_shared_memory_status("in")[0]["byte_size"] == 256
        tensor = http.InferInput("input", [1, 64], "FP32")
        tensor.set_shared_memory("in", 256)
        wanted = http.InferRequestedOutput("output", binary_data=True)
        wanted.set_shared_memory("out", 256)
        answer = c.infer("autoencoder", [tensor], outputs=[wanted])
        assert "data" not in answer.get_output("output")
        assert answer.get_output("output")["parameters"]["shared_memory_region"] == "out"
        got = shm.get_contents_as_numpy(taken, np.float32, [1, 64])
        assert np.array_equal(got, reference())
        refused(lambda: c.register_system_shared_memory("in", "/pithead_test_in", 256), 409, "registered")
        refused(lambda: c.register_system_shared_memory("no", "/nothing_there", 256), 400, "key")
        refused(lambda: c.register_system_shared_memory("no", "/../etc/passwd", 1), 400, "key")
        tensor.set_shared_memory("in", 256, offset=8)
        refused(lambda: c.infer("autoencoder", [tensor]), 400, "beyond")
        c.unregister_system_shared_memory("in")
        refused(lambda: c.infer("autoencoder", [tensor]), 404, "no region")
        c.unregister_system_shared_memory()
        assert c.get_system_shared_memory_status() == []
    finally:
        shm.destroy_shared_memory_region(given)
        shm.destroy_shared_memory_region(taken)


def cuda_shared_memory():
    refused(lambda: client().register_cuda_shared_memory("x", b"AAAA", 0, 16), 400, "CUDA")
    refused(lambda: client().get_cuda_shared_memory_status(), 400, "CUDA")


def repository():
    c = client()
    lines = {(r["name"], r["version"]): r["state"] for r in c.get_model_repository_index()}
    assert (lines["add_sub", "3"], lines["add_sub", "1"]) == ("READY", "UNAVAILABLE"), lines
    c.unload_model("mean_over_rows")
    assert not c.is_model_ready("mean_over_rows")
    refused(lambda: c.get_model_metadata("mean_over_rows"), 404, "mean_over_rows")
    c.load_model("mean_over_rows")
    assert c.is_model_ready("mean_over_rows")
    config = {
        "max_batch_size": 4,
        "dynamic_batching": {"preferred_batch_size": [2], "max_queue_delay_microseconds": 100},
    }
    c.load_model("autoencoder", config=json.dumps(config))
    assert c.get_model_config("autoencoder")["max_batch_size"] == 4
    assert c.get_model_config("autoencoder")["dynamic_batching"]["preferred_batch_size"] == [2]
    c.load_model("autoencoder", config="{}")
    refused(lambda: c.load_model("nothing"), 404, "nothing")
    refused(lambda: c.load_model("autoencoder", config="no json"), 400, "config")


def errors():
    c = client()
    refused(lambda: c.infer("nothing", inputs()), 404, "nothing")
    refused(lambda: c.infer("autoencoder", inputs(), model_version="9"), 404, "version")
    refused(lambda: c.infer("autoencoder", inputs(x=X[:, :5])), 400, "shape")
    refused(lambda: c.infer("autoencoder", inputs(name="nothing")), 400, "nothing")
    refused(lambda: c.infer("autoencoder", inputs(x=X.astype(np.float64), datatype="FP64")), 400, "FP64")
    refused(
        lambda: c.infer("autoencoder", inputs(), outputs=[http.InferRequestedOutput("nothing")]),
        400,
        "nothing",
    )


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


HELPERS = {"client", "inputs", "reference", "refused", "main"}

if __name__ == "__main__":
    main()
