"""What the fuzzer begins with: right messages of each kind, made in code."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.engine.serve.proto.messages import CLASSES
from contract import codec
from contract.manifest import FileRef, Golden, Manifest, Provenance, TensorSpec, Variant
from contract.messages import Desired

CONTENT_TYPES = (None, "application/json", "application/json+zstd", "application/zstd")
X = np.ones((1, 4), np.float32)


def rest() -> list[bytes]:
    """Bodies behind their first byte: JSON, and binary whose JSON part is a multiple of four."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
    texts = {"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}
    output = {"name": "y", "parameters": {"binary_data": True, "classification": 2}}
    whole = {
        "id": "1",
        "inputs": [{**tensor, "data": X.tolist()}, texts],
        "outputs": [output],
        "parameters": {"priority": 1, "timeout": 5, "binary_data_output": True},
    }
    shared = {"shared_memory_region": "r", "shared_memory_offset": 0, "shared_memory_byte_size": 16}
    found = [b"\0" + json.dumps(whole).encode()]
    found.append(b"\0" + json.dumps({"inputs": [{**tensor, "parameters": shared}]}).encode())
    for datatype in ("FP32", "INT64", "BYTES", "BF16", "FP16", "BOOL"):
        said = {**tensor, "datatype": datatype, "parameters": {"binary_data_size": 16}}
        head = json.dumps({"inputs": [said]}).encode()
        head += b" " * (-len(head) % 4)
        found.append(bytes([len(head) // 4 + 1]) + head + X.tobytes())
    return found


def http() -> list[bytes]:
    """Requests behind the byte that says in which pieces they come."""
    plain = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    body = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nabcd"
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    awaited = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n."
    ended = b"GET / HTTP/1.0\r\nConnection: keep-alive, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    return [b"\0" + plain + body, b"\7" + body + chunked, b"\1" + awaited, b"\0" + ended, b"\0" + plain * 5]


def grpc() -> list[bytes]:
    """``ModelInferRequest`` with raw and typed tensors, parameters, outputs, and a region."""
    made = CLASSES["ModelInferRequest"]
    raw = made(model_name="m", raw_input_contents=[X.tobytes()])
    raw.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    typed = made(model_name="m", id="1", model_version="1")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 4]).contents.fp32_contents.extend([1.0] * 4)
    typed.inputs.add(name="t", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
    typed.parameters["priority"].uint64_param = 1
    typed.parameters["binary_data_output"].bool_param = False
    typed.outputs.add(name="y").parameters["classification"].int64_param = 2
    shared = made(model_name="m")
    parameters = shared.inputs.add(name="x", datatype="FP32", shape=[1, 4]).parameters
    parameters["shared_memory_region"].string_param = "r"
    parameters["shared_memory_byte_size"].int64_param = 16
    return [message.SerializeToString() for message in (raw, typed, shared)]


def contract() -> list[bytes]:
    """A manifest, a desired document, a batch."""
    ref = FileRef("model.onnx", hashlib.sha256(b"").hexdigest(), 1)
    spec = (TensorSpec("x", "FP32", (1, 4)),)
    variant = Variant(
        name="v",
        file=ref,
        format="onnx",
        quantisation="float32",
        inputs=spec,
        outputs=spec,
        golden=Golden(ref, 1, {}),
    )
    manifest = Manifest(
        format=1,
        name="m",
        version="1.0.0",
        release_counter=1,
        summary="",
        licence="Apache-2.0",
        variants=(variant,),
        provenance=Provenance(source="", data=""),
    )
    desired = Desired(v=1, device="d", revision=1, models=())
    return [msgspec.json.encode(manifest), msgspec.json.encode(desired), codec.join_batch([b"{}"])[0], b"[]"]


WORDS = (
    *("0", "3", "-1", "1.5", "1e999", "9223372036854775807", "18446744073709551616", "null", "true", "[]"),
    *(
        "{}",
        '""',
        "[[1]]",
        "NaN",
        "FP32",
        "FP64",
        "BF16",
        "INT64",
        "UINT8",
        "BOOL",
        "BYTES",
        "inputs",
        "outputs",
    ),
    *("data", "shape", "datatype", "parameters", "binary_data", "binary_data_size", "binary_data_output"),
    *("classification", "priority", "timeout", "sequence_id", "shared_memory_region", "shared_memory_offset"),
    *(
        "shared_memory_byte_size",
        "GET ",
        "HEAD ",
        "POST /v2",
        "HTTP/1.0",
        "\r\n",
        "\r\n\r\n",
        "\0",
        "\\ud800",
    ),
    *("Content-Length: ", "Transfer-Encoding: chunked", "Connection: close", "Expect: 100-continue"),
    *("Upgrade: h2c", "Content-Encoding: gzip", "FFFFFFFFFFFFFFFF\r\n"),
)
"""What single bytes rarely become."""
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 3, 16, -1, 1.5, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 1e308),
    *("", "x", "r", "FP32", "FP16", "BF16", "INT8", "UINT64", "BOOL", "BYTES", "\0", "é", "x" * 2000),
    *(
        [],
        {},
        [[]],
        [0],
        [1, 4],
        [-1],
        [2**40, 2**40],
        [None],
        ["a"],
        [[1.0], 2.0],
        {"shared_memory_region": "r"},
    ),
    *({"binary_data_size": 16}, {"classification": 2**40}, {"binary_data": False}),
]
"""What a part of a document becomes."""
SEEDS = {"rest": rest, "http": http, "grpc": grpc, "contract": contract}


def write(target: str, corpus: Path) -> None:
    """Put the seeds of a target into its corpus, beside what earlier runs have found."""
    corpus.mkdir(parents=True, exist_ok=True)
    said = "".join("".join(f"\\x{byte:02x}" for byte in word.encode()).join('""') + "\n" for word in WORDS)
    corpus.with_name("words").write_text(said)
    for i, seed in enumerate(SEEDS[target]()):
        (corpus / f"seed-{i}").write_bytes(seed)
