"""What people write by hand: FastAPI, orjson and onnxruntime; no validation, metrics or tokens."""

import sys

import numpy as np
import onnxruntime
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
app = FastAPI()


@app.get("/v2/health/ready")
async def ready() -> dict[str, bool]:
    return {"ready": True}


@app.post("/v2/models/autoencoder/infer")
async def infer(request: Request) -> Response:
    body = await request.body()
    length = request.headers.get("inference-header-content-length")
    if length is None:
        asked = orjson.loads(body)
        x = np.array(asked["inputs"][0]["data"], np.float32).reshape(asked["inputs"][0]["shape"])
    else:
        at = int(length)
        asked = orjson.loads(body[:at])
        x = np.frombuffer(body, np.float32, offset=at).reshape(asked["inputs"][0]["shape"])
    y = session.run(["output"], {"input": x})[0]
    output = {"name": "output", "datatype": "FP32", "shape": y.shape}
    answer = {"model_name": "autoencoder", "model_version": "1", "outputs": [output]}
    if length is None:
        output["data"] = y.ravel()
        return Response(
            orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )
    data = y.tobytes()
    output["parameters"] = {"binary_data_size": len(data)}
    head = orjson.dumps(answer)
    return Response(
        head + data,
        media_type="application/octet-stream",
        headers={"inference-header-content-length": str(len(head))},
    )


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
