"""The same model in Triton's Python backend, which is what its PyPI distribution has."""

import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, _args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options)

    def execute(self, requests):
        arrays = [pb.get_input_tensor_by_name(r, "input").as_numpy() for r in requests]
        together = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        outputs = self.session.run(["output"], {"input": together})[0]
        answers, at = [], 0
        for array in arrays:
            end = at + len(array)
            answers.append(pb.InferenceResponse([pb.Tensor("output", outputs[at:end])]))
            at = end
        return answers
