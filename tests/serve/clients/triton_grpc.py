"""Every call of ``tritonclient.grpc``, against a server of ours. Runs in the client's own environment.

Prints one JSON object: the name of each call, and what was wrong with it (null where it was right).
``descriptors`` as the second argument prints the messages that the client knows instead.
"""

import asyncio
import json
import queue
import sys
import traceback

import numpy as np
import tritonclient.utils.shared_memory as shm
from tritonclient import grpc
from tritonclient.grpc import aio, service_pb2
from tritonclient.grpc.auth import BasicAuth
from tritonclient.utils import InferenceServerException

URL = f"127.0.0.1:{sys.argv[1]}"
X = np.arange(64, dtype=np.float32).reshape(1, 64) / 64


def client(**options):
    return grpc.InferenceServerClient(URL, **options)


def inputs(x=X, name="input", datatype="FP32"):
    tensor = grpc.InferInput(name, list(x.shape), datatype)
    tensor.set_data_from_numpy(x)
    return [tensor]


def reference(x=X):
    return client().infer("autoencoder", inputs(x)).as_numpy("output")


def refused(call, status, words):
    try:
        call()
    except InferenceServerException as error:
        assert error.status() == f"StatusCode.{status}", (error.status(), error.message())
        assert words in error.message(), error.message()
    else:
        raise AssertionError("it was not refused")


def server_live_and_ready():
    assert client().is_server_live()
    assert client().is_server_ready()


def model_ready():
    assert client().is_model_ready("autoencoder")
    assert client().is_model_ready("add_sub", "3")
    assert not client().is_model_ready("nothing")


def server_metadata():
    found = client().get_server_metadata()
    assert found.name == "pithead"
    assert "model_repository" in found.extensions
    assert client().get_server_metadata(as_json=True)["name"] == "pithead"


def model_metadata():
    found = client().get_model_metadata("add_sub", as_json=True)
    assert found["versions"] == ["3"], found
    assert found["inputs"][1] == {"name": "INPUT1", "datatype": "INT32", "shape": ["1", "16"]}, found
    assert client().get_model_metadata("autoencoder", "1").outputs[0].shape == [-1, 64]


def model_config():
    found = client().get_model_config("autoencoder").config
    assert found.max_batch_size > 1
    assert (found.input[0].name, found.input[0].data_type, list(found.input[0].dims)) == ("input", 11, [64])
    assert found.dynamic_batching.default_queue_policy.max_queue_size > 0
    assert found.parameters["runs"].string_value
    assert found.instance_group[0].kind == 2


def infer():
    answer = client().infer("autoencoder", inputs(), outputs=[grpc.InferRequestedOutput("output")])
    assert answer.as_numpy("output").shape == (1, 64)
    assert answer.get_response().model_version == "1"
    assert answer.get_output("output").datatype == "FP32"


def infer_version_id_and_parameters():
    answer = client().infer(
        "autoencoder",
        inputs(),
        model_version="1",
        request_id="abc",
        priority=1,
        timeout=5_000_000,
        parameters={"recipe": "B", "n": 3, "b": True},
        headers={"x-anything": "1"},
        client_timeout=20,
    )
    assert answer.get_response().id == "abc"


def infer_outputs_in_order():
    a = np.arange(16, dtype=np.int32).reshape(1, 16)
    two = [*inputs(a, "INPUT0", "INT32"), *inputs(a * 2, "INPUT1", "INT32")]
    wanted = [grpc.InferRequestedOutput("OUTPUT1"), grpc.InferRequestedOutput("OUTPUT0")]
    answer = client().infer("add_sub", two, outputs=wanted)
    assert [o.name for o in answer.get_response().outputs] == ["OUTPUT1", "OUTPUT0"]
    assert np.array_equal(answer.as_numpy("OUTPUT0"), 3 * a)
    assert np.array_equal(answer.as_numpy("OUTPUT1"), -a)


def infer_callback():
    answers = queue.Queue()
    with client() as c:
        waiting = [
            c.async_infer("autoencoder", inputs(X * i), lambda result, error: answers.put((result, error)))
            for i in range(20)
        ]
        for _ in waiting:
            result, error = answers.get(timeout=20)
            assert error is None, error
            assert result.as_numpy("output").shape == (1, 64)
        c.async_infer("nothing", inputs(), lambda result, error: answers.put((result, error)))
        assert "nothing" in answers.get(timeout=20)[1].message()


def infer_cancelled():
    answers = queue.Queue()
    with client() as c:
        call = c.async_infer("autoencoder", inputs(), lambda result, error: answers.put((result, error)))
        call.cancel()
        answers.get(timeout=20)
        assert c.is_server_live()


def infer_compressed():
    x = np.repeat(X, 8, axis=0)
    for algorithm in ("gzip", "deflate"):
        answer = client().infer("autoencoder", inputs(x), compression_algorithm=algorithm)
        assert np.allclose(answer.as_numpy("output"), reference(), rtol=1e-4, atol=1e-5)


def every_datatype():
    random = np.random.default_rng(0)
    kinds = {
        "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
        "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
        "FP32": np.float32, "FP64": np.float64,
    }  # fmt: skip
    arrays = {d: random.integers(0, 2, (2, 3)).astype(t) for d, t in kinds.items()}
    given = [inputs(array, f"in_{d}", d)[0] for d, array in arrays.items()]
    answer = client().infer("every_type", given)
    for d, array in arrays.items():
        got = answer.as_numpy(f"out_{d}")
        assert (got.dtype, np.array_equal(got, array)) == (array.dtype, True), d


def classification():
    a = np.arange(16, dtype=np.int32).reshape(1, 16)
    two = [*inputs(a, "INPUT0", "INT32"), *inputs(-a, "INPUT1", "INT32")]
    wanted = [grpc.InferRequestedOutput("OUTPUT0", class_count=2)]
    found = client().infer("add_sub", two, outputs=wanted).as_numpy("OUTPUT0")
    assert found.ravel().tolist() == [b"0:0:zero", b"0:1:one"], found
    batch = client().infer(
        "autoencoder",
        inputs(np.repeat(X, 2, axis=0)),
        outputs=[grpc.InferRequestedOutput("output", class_count=3)],
    )
    assert batch.as_numpy("output").shape == (2, 3)


def stream():
    answers = queue.Queue()
    with client() as c:
        c.start_stream(lambda result, error: answers.put((result, error)), headers={"x": "1"})
        for i in range(50):
            c.async_stream_infer("autoencoder", inputs(X * i), request_id=str(i))
        for i in range(50):
            result, error = answers.get(timeout=20)
            assert error is None, error
            assert result.get_response().id == str(i)
        c.async_stream_infer(
            "autoencoder", inputs(), request_id="last", enable_empty_final_response=True, sequence_id=7
        )
        result, error = answers.get(timeout=20)
        assert result.get_response().parameters["triton_final_response"].bool_param
        c.async_stream_infer("nothing", inputs(), request_id="bad")
        result, error = answers.get(timeout=20)
        assert "nothing" in error.message()
        c.async_stream_infer("autoencoder", inputs())
        assert np.allclose(answers.get(timeout=20)[0].as_numpy("output"), reference(), rtol=1e-4, atol=1e-5)
        c.stop_stream()


def asyncio_client():
    async def work():
        async with aio.InferenceServerClient(URL) as c:
            assert await c.is_server_live()
            assert await c.is_server_ready()
            assert await c.is_model_ready("autoencoder")
            assert (await c.get_server_metadata()).name == "pithead"
            assert (await c.get_model_metadata("autoencoder")).platform
            assert (await c.get_model_config("autoencoder")).config.name == "autoencoder"
            assert (await c.get_model_repository_index()).models
            assert (await c.get_inference_statistics("autoencoder")).model_stats
            assert (await c.get_trace_settings()).settings
            assert (await c.get_log_settings()).settings
            answers = await asyncio.gather(*(c.infer("autoencoder", inputs(X * i)) for i in range(20)))
            assert all(a.as_numpy("output").shape == (1, 64) for a in answers)

            async def requests():
                for i in range(20):
                    yield {"model_name": "autoencoder", "inputs": inputs(X * i), "request_id": str(i)}

            got = [(r, e) async for r, e in c.stream_infer(requests())]
            assert [r.get_response().id for r, _ in got] == [str(i) for i in range(20)]
            assert all(e is None for _, e in got)

    asyncio.run(work())


def statistics():
    before = client().get_inference_statistics("autoencoder").model_stats[0]
    client().infer("autoencoder", inputs(np.repeat(X, 3, axis=0)))
    after = client().get_inference_statistics("autoencoder", "1").model_stats[0]
    assert after.inference_count == before.inference_count + 3
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert any(b.batch_size == 3 for b in after.batch_stats)
    assert after.last_inference > 0
    assert len(client().get_inference_statistics().model_stats) >= 5


def trace_settings():
    c = client()
    assert list(c.get_trace_settings().settings["trace_level"].value) == ["OFF"]
    settings = {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "5"}
    assert list(c.update_trace_settings(settings=settings).settings["trace_rate"].value) == ["5"]
    assert list(c.get_trace_settings("autoencoder").settings["trace_level"].value) == settings["trace_level"]
    c.update_trace_settings("autoencoder", {"trace_rate": "7"})
    assert list(c.get_trace_settings("autoencoder").settings["trace_rate"].value) == ["7"]
    c.update_trace_settings("autoencoder", {"trace_rate": None})
    c.update_trace_settings(settings={"trace_level": None, "trace_rate": None})
    assert list(c.get_trace_settings().settings["trace_rate"].value) == ["1000"]
    path = {"trace_file": "/etc/passwd"}
    refused(lambda: c.update_trace_settings(settings=path), "INVALID_ARGUMENT", "trace_file")


def log_settings():
    c = client()
    assert c.get_log_settings().settings["log_info"].bool_param is True
    found = c.update_log_settings({"log_verbose_level": 1}).settings
    assert found["log_verbose_level"].uint32_param == 1
    assert c.update_log_settings({"log_verbose_level": 0}, as_json=True)
    refused(lambda: c.update_log_settings({"log_file": "/tmp/x"}), "INVALID_ARGUMENT", "log_file")


def system_shared_memory():
    c = client()
    c.unregister_system_shared_memory()
    given = shm.create_shared_memory_region("in", "/pithead_grpc_in", 256)
    taken = shm.create_shared_memory_region("out", "/pithead_grpc_out", 256)
    try:
        shm.set_shared_memory_region(given, [X])
        c.register_system_shared_memory("in", "/pithead_grpc_in", 256)
        c.register_system_shared_memory("out", "/pithead_grpc_out", 256)
        assert set(c.get_system_shared_memory_status().regions) == {"in", "out"}
        assert c.get_system_shared_memory_status("in").regions["in"].byte_size == 256
        tensor = grpc.InferInput("input", [1, 64], "FP32")
        tensor.set_shared_memory("in", 256)
        wanted = grpc.InferRequestedOutput("output")
        wanted.set_shared_memory("out", 256)
        answer = c.infer("autoencoder", [tensor], outputs=[wanted])
        output = answer.get_output("output")
        assert output.parameters["shared_memory_region"].string_param == "out"
        assert np.array_equal(shm.get_contents_as_numpy(taken, np.float32, [1, 64]), reference())
        key = "/pithead_grpc_in"
        refused(lambda: c.register_system_shared_memory("in", key, 256), "ALREADY_EXISTS", "registered")
        refused(lambda: c.register_system_shared_memory("no", "/nothing", 256), "INVALID_ARGUMENT", "key")
        tensor.set_shared_memory("in", 256, offset=8)
        refused(lambda: c.infer("autoencoder", [tensor]), "INVALID_ARGUMENT", "beyond")
        c.unregister_system_shared_memory("in")
        refused(lambda: c.infer("autoencoder", [tensor]), "NOT_FOUND", "no region")
        c.unregister_system_shared_memory()
        assert not c.get_system_shared_memory_status().regions
    finally:
        shm.destroy_shared_memory_region(given)
        shm.destroy_shared_memory_region(taken)


def cuda_shared_memory():
    c = client()
    refused(lambda: c.register_cuda_shared_memory("x", b"AAAA", 0, 16), "UNIMPLEMENTED", "CUDA")
    refused(c.get_cuda_shared_memory_status, "UNIMPLEMENTED", "CUDA")
    refused(c.unregister_cuda_shared_memory, "UNIMPLEMENTED", "CUDA")


def repository():
    c = client()
    lines = {(m.name, m.version): m.state for m in c.get_model_repository_index().models}
    assert (lines["add_sub", "3"], lines["add_sub", "1"]) == ("READY", "UNAVAILABLE"), lines
    c.unload_model("mean_over_rows", unload_dependents=True)
    assert not c.is_model_ready("mean_over_rows")
    refused(lambda: c.get_model_metadata("mean_over_rows"), "NOT_FOUND", "mean_over_rows")
    c.load_model("mean_over_rows")
    assert c.is_model_ready("mean_over_rows")
    config = {"max_batch_size": 4, "dynamic_batching": {"preferred_batch_size": [2]}}
    c.load_model("autoencoder", config=json.dumps(config))
    assert c.get_model_config("autoencoder").config.max_batch_size == 4
    assert c.get_model_config("autoencoder").config.dynamic_batching.preferred_batch_size == [2]
    c.load_model("autoencoder", config="{}")
    refused(lambda: c.load_model("nothing"), "NOT_FOUND", "nothing")
    refused(lambda: c.load_model("autoencoder", config="no json"), "INVALID_ARGUMENT", "config")
    files = {"file:1/model.onnx": b"x"}
    refused(lambda: c.load_model("autoencoder", config="{}", files=files), "INVALID_ARGUMENT", "only config")


def plugin():
    c = client()
    c.register_plugin(BasicAuth("a", "b"))
    assert c.is_server_live()


def keepalive():
    options = grpc.KeepAliveOptions(keepalive_time_ms=10_000, keepalive_permit_without_calls=True)
    assert client(keepalive_options=options).is_server_live()


def errors():
    c = client()
    refused(lambda: c.infer("nothing", inputs()), "NOT_FOUND", "nothing")
    refused(lambda: c.infer("autoencoder", inputs(), model_version="9"), "NOT_FOUND", "version")
    refused(lambda: c.infer("autoencoder", inputs(X[:, :5].copy())), "INVALID_ARGUMENT", "shape")
    refused(lambda: c.infer("autoencoder", inputs(name="nothing")), "INVALID_ARGUMENT", "nothing")
    wide = inputs(X.astype(np.float64), datatype="FP64")
    refused(lambda: c.infer("autoencoder", wide), "INVALID_ARGUMENT", "FP64")
    wanted = [grpc.InferRequestedOutput("nothing")]
    refused(lambda: c.infer("autoencoder", inputs(), outputs=wanted), "INVALID_ARGUMENT", "nothing")


def descriptors():
    """Each call's messages, field by field, and those within them."""

    def fields(message):
        return {
            str(f.number): [
                f.name,
                f.type,
                f.is_repeated,
                f.containing_oneof.name if f.containing_oneof else "",
                fields(f.message_type) if f.message_type else None,
                {str(v.number): v.name for v in f.enum_type.values} if f.enum_type else None,
            ]
            for f in message.fields
        }

    (service,) = service_pb2.DESCRIPTOR.services_by_name.values()
    return {m.name: [fields(m.input_type), fields(m.output_type)] for m in service.methods}


def main():
    if sys.argv[2:] == ["descriptors"]:
        print(json.dumps(descriptors()))
        return
    results = {}
    for name, call in list(globals().items()):
        if callable(call) and getattr(call, "__module__", "") == "__main__" and name not in HELPERS:
            try:
                call()
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc()
    print(json.dumps(results))


HELPERS = {"client", "inputs", "reference", "refused", "descriptors", "main"}

if __name__ == "__main__":
    main()
