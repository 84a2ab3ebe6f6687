"""What people write by hand: grpc.aio and onnxruntime; no validation, no metrics, no authentication."""

import asyncio
import sys

import grpc
import numpy as np
import onnxruntime

from agent.engine.serve.proto.messages import CLASSES, SERVICE

Request, Response = CLASSES["ModelInferRequest"], CLASSES["ModelInferResponse"]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])


async def infer(request, _context):
    asked = request.inputs[0]
    x = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(asked.shape)
    y = session.run(["output"], {"input": x})[0]
    answer = Response(model_name=request.model_name, model_version="1", raw_output_contents=[y.tobytes()])
    answer.outputs.add(name="output", datatype="FP32", shape=y.shape)
    return answer


async def main() -> None:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(infer, Request.FromString, Response.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[2]}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    if sys.argv[3:] == ["uvloop"]:
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())
