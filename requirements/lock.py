"""Pin every dependency with its hashes, for all platforms, without index addresses.

Run by ``make lock``. The index is the one that pip or uv is set up for.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMON = [
    sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--generate-hashes",
    "--no-emit-index-url", "--no-annotate", "--no-header", "--python-version", "3.11",
]  # fmt: skip
TFLITE_RUNTIME = "tflite-runtime==2.14.0\nnumpy<2\nmsgspec\nzstandard\npyseccomp\n"
OPENVINO = "onnxruntime-openvino==1.24.1\nnumpy\nmsgspec\nzstandard\npyseccomp\n"
CLIENTS = {
    "client-triton": "tritonclient[http,grpc]==2.73.0\n",
    "client-kserve": "kserve==0.21.0\n",
    "client-pytriton": "nvidia-pytriton==0.7.0\n",  # a whole Triton server too
    "client-mlserver": "mlserver==1.7.1\nuvloop<0.22\n",
}
"""Other people's clients of the Open Inference Protocol, each in an environment of its own."""
PEERS = {
    "peer-fastapi": "fastapi\norjson\nuvicorn[standard]\nonnxruntime\n",
    "peer-triton": "nvidia-pytriton==0.7.0\nonnxruntime\n",
    "peer-mlserver": "mlserver==1.7.1\nuvloop<0.22\nonnxruntime\n",
}
"""Servers that `make bench-serving` measures beside ours."""

FUZZ = {"fuzz": "atheris==3.0.0\nhttptools\nmsgspec\nnumpy\nprotobuf\nzstandard\n"}
"""`make fuzz`: the decoders and what they need, under a fuzzer."""
CONVERTERS = {"import-scikit-learn": "scikit-learn==1.9.1\nskl2onnx==1.20.0\n"}
"""For `pithead models import`: where a framework and its converter are, with no part of Pithead."""


def compile_set(name: str, *arguments: str, stdin: str | None = None) -> None:
    """Write ``requirements/<name>.txt``."""
    command = [*COMMON, *arguments, "--constraint", str(HERE / "constraints.in")]
    command += ["--output-file", str(HERE / f"{name}.txt")]
    subprocess.run(command, check=True, input=stdin, text=True, cwd=HERE.parent)


def main() -> None:
    """Pin all sets."""
    for extra in ("agent", "control-plane", "dev"):
        compile_set(extra, "--universal", "pyproject.toml", "--extra", extra)
    compile_set("data", "--universal", "--no-deps", "-", stdin="river==0.26.1\n")
    compile_set("tflite-runtime", "-", stdin=TFLITE_RUNTIME)
    compile_set("openvino", "-", stdin=OPENVINO)
    for name, wanted in (CLIENTS | PEERS | CONVERTERS | FUZZ).items():
        compile_set(name, "-", stdin=wanted)


if __name__ == "__main__":
    main()
