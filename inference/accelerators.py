"""What each runtime can use besides its own kernels, in one table per runtime.

Data only, so that the supervisor can read it without a runtime. A device
adds its own, or changes one of these, by a table ``[accelerators.NAME]`` of
its settings; a manifest may set the options that ``hints`` names, and no
others, since an option can be a path to code.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from contract.errors import PitheadError

Format = Literal["onnx", "tflite"]
Options = dict[str, str]


class Accelerator(Struct, frozen=True, omit_defaults=True):
    """Something that a runtime can use, and how it is asked to."""

    name: str
    library: str = ""
    """LiteRT: the external delegate. ONNX Runtime: what is registered before its provider is asked for."""
    provider: str = ""
    """ONNX Runtime's execution provider."""
    options: Options = {}
    hints: tuple[str, ...] = ()
    """Options that a manifest may set."""
    needs: tuple[str, ...] = ()
    """Device files, any of which must exist; the probe's sandbox leaves them open."""
    reads: tuple[str, ...] = ()
    """Python packages of which it reads files with each model; the sandbox leaves them readable."""
    packages: tuple[str, ...] = ()
    """Distributions of the runtime that contain it; any, where none is named."""
    system: str = "linux"
    """``sys.platform`` where it exists; empty for all."""
    what: str = ""
    """For people."""


class Custom(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table ``[accelerators.NAME]`` of a device's settings."""

    format: Format
    library: str = ""
    provider: str = ""
    options: dict[str, str | int | float | bool] = {}
    devices: tuple[Annotated[str, Meta(pattern=r"^/dev/")], ...] = ()
    """Device files that its driver opens."""


CustomTable = Mapping[str, Custom]

_NVIDIA: Final = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0/ctrl")
_RENDER: Final = ("/dev/dri/renderD128", "/dev/mali0", "/dev/kgsl-3d0")

ONNX: Final = (
    Accelerator(
        "tensorrt",
        provider="TensorrtExecutionProvider",
        hints=("trt_fp16_enable", "trt_int8_enable", "trt_max_workspace_size"),
        needs=_NVIDIA,
        packages=("onnxruntime-gpu",),
        what="NVIDIA TensorRT",
    ),
    Accelerator(
        "cuda",
        provider="CUDAExecutionProvider",
        hints=("device_id", "gpu_mem_limit", "arena_extend_strategy", "cudnn_conv_algo_search", "use_tf32"),
        needs=_NVIDIA,
        packages=("onnxruntime-gpu",),
        what="NVIDIA CUDA",
    ),
    Accelerator(
        "qnn",
        provider="QNNExecutionProvider",
        options={"backend_type": "htp"},
        hints=("backend_type", "htp_performance_mode", "htp_graph_finalization_optimization_mode"),
        needs=("/dev/fastrpc-cdsp", "/dev/fastrpc-cdsp-secure", "/dev/adsprpc-smd"),
        packages=("onnxruntime-qnn",),
        what="Qualcomm AI Engine Direct: Hexagon",
    ),
    Accelerator(
        "openvino",
        provider="OpenVINOExecutionProvider",
        options={"device_type": "CPU"},
        hints=("device_type", "precision", "num_streams"),
        reads=("onnxruntime",),
        packages=("onnxruntime-openvino",),
        what="Intel OpenVINO, on the CPU unless `device_type` says GPU or NPU",
    ),
    Accelerator(
        "coreml",
        provider="CoreMLExecutionProvider",
        hints=("ModelFormat", "MLComputeUnits", "RequireStaticInputShapes"),
        system="darwin",
        what="Apple Core ML",
    ),
    Accelerator(
        "directml",
        provider="DmlExecutionProvider",
        hints=("device_id", "performance_preference"),
        packages=("onnxruntime-directml",),
        system="win32",
        what="DirectX 12 GPUs",
    ),
    Accelerator(
        "nnapi", provider="NnapiExecutionProvider", system="android", what="Android's Neural Networks API"
    ),
    Accelerator(
        "acl",
        provider="ACLExecutionProvider",
        hints=("enable_fast_math",),
        needs=("/usr/lib/libarm_compute.so", "/usr/lib/aarch64-linux-gnu/libarm_compute.so"),
        what="Arm Compute Library; a build of ONNX Runtime with it",
    ),
    Accelerator(
        "webgpu",
        provider="WebGpuExecutionProvider",
        hints=("powerPreference", "preferredLayout"),
        needs=_RENDER,
        what="WebGPU through Dawn; a build of ONNX Runtime with it, or its plugin as `library`",
    ),
    Accelerator(
        "xnnpack",
        provider="XnnpackExecutionProvider",
        what="XNNPACK; a build of ONNX Runtime with it",
    ),
    Accelerator("cpu", provider="CPUExecutionProvider", system="", what="ONNX Runtime's own kernels"),
)
"""Best first."""

TFLITE: Final = (
    Accelerator(
        "edgetpu",
        library="libedgetpu.so.1",
        hints=("device",),
        needs=("/dev/apex_0", "/dev/bus/usb"),
        what="Coral Edge TPU; the model is compiled for it",
    ),
    Accelerator(
        "ethosu",
        library="libethosu_delegate.so",
        hints=("enable_cycle_counter",),
        needs=("/dev/ethosu0",),
        what="Arm Ethos-U; the model is compiled by Vela",
    ),
    Accelerator(
        "hexagon",
        library="libQnnTFLiteDelegate.so",
        options={"backend_type": "htp"},
        hints=("backend_type", "htp_performance_mode"),
        needs=("/dev/fastrpc-cdsp", "/dev/fastrpc-cdsp-secure", "/dev/adsprpc-smd"),
        what="Qualcomm Hexagon through the QNN delegate",
    ),
    Accelerator(
        "vx",
        library="libvx_delegate.so",
        hints=("device_id",),
        needs=("/dev/galcore",),
        what="VeriSilicon NPUs (NXP i.MX 8M Plus, Amlogic) through TIM-VX",
    ),
    Accelerator(
        "armnn",
        library="libarmnnDelegate.so",
        options={"backends": "GpuAcc,CpuAcc"},
        hints=("backends", "reduce-fp32-to-fp16", "number-of-threads"),
        needs=("/dev/mali0",),
        what="Arm NN: Mali GPUs and Neon",
    ),
    Accelerator(
        "gpu",
        library="libtensorflowlite_gpu_delegate.so",
        hints=("precision_loss_allowed", "inference_preference"),
        needs=_RENDER,
        what="LiteRT's GPU delegate: OpenCL or OpenGL ES",
    ),
    Accelerator(
        "nnapi",
        library="libnnapi_delegate.so",
        hints=("accelerator_name", "execution_preference"),
        system="android",
        what="Android's Neural Networks API",
    ),
    Accelerator("xnnpack", system="", what="XNNPACK, in LiteRT itself"),
    Accelerator("cpu", system="", what="LiteRT's built-in kernels"),
)
"""Best first."""

FORMATS: Final[tuple[Format, ...]] = ("onnx", "tflite")
TABLES: Final[Mapping[str, tuple[Accelerator, ...]]] = {"onnx": ONNX, "tflite": TFLITE}
"""By the manifest's ``format``."""


def find(
    model_format: str,
    name: str,
    custom: CustomTable | None = None,
    hints: Mapping[str, str] | None = None,
) -> Accelerator:
    """Return an accelerator with what the device's settings and a manifest's hints make of it.

    Raises ``inference.accelerator_missing`` for a name that neither table
    nor settings know, ``package.manifest_invalid`` for a hint that is not allowed.
    """
    found = next((a for a in TABLES.get(model_format, ()) if a.name == name), None)
    own = (custom or {}).get(name)
    if own is not None and own.format == model_format:
        found = _changed(found or Accelerator(name, system="", what="of this device's settings"), own)
    if found is None:
        raise PitheadError(
            "inference.accelerator_missing",
            f"no accelerator {name!r} is known for {model_format} models",
            accelerator=name,
        )
    for key in hints or {}:
        if key not in found.hints:
            raise PitheadError(
                "package.manifest_invalid",
                f"accelerator_options.{name}.{key}: a manifest may set {list(found.hints)}",
                path=f"accelerator_options.{name}.{key}",
            )
    return msgspec.structs.replace(found, options={**found.options, **(hints or {})}) if hints else found


def _changed(accelerator: Accelerator, own: Custom) -> Accelerator:
    said = {key: str(v).lower() if isinstance(v, bool) else str(v) for key, v in own.options.items()}
    return msgspec.structs.replace(
        accelerator,
        library=own.library or accelerator.library,
        provider=own.provider or accelerator.provider,
        options={**accelerator.options, **said},
        needs=own.devices or accelerator.needs,
        packages=() if own.library else accelerator.packages,
    )


def here(accelerator: Accelerator, package: str) -> bool:
    """Whether this machine may have it. A device file is a hint only: the probe has the last word."""
    return (
        sys.platform.startswith(accelerator.system)
        and (not accelerator.packages or package in accelerator.packages)
        and (not accelerator.needs or any(Path(path).exists() for path in accelerator.needs))
    )


def for_format(model_format: Format, package: str, custom: CustomTable | None = None) -> tuple[str, ...]:
    """Return the names of what a runtime may have here, the device's own first, ``cpu`` last.

    ``package`` is the distribution that provides the runtime.
    """
    own = [name for name, c in (custom or {}).items() if c.format == model_format]
    names = dict.fromkeys([*(n for n in own if not _known(model_format, n)), *_names(model_format)])
    return tuple(n for n in names if here(find(model_format, n, custom), package))


def _known(model_format: Format, name: str) -> bool:
    return name in _names(model_format)


def _names(model_format: Format) -> tuple[str, ...]:
    return tuple(a.name for a in TABLES[model_format])


class Resources(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a device lends to its models."""

    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    """Of one run of one model."""
    cpus: tuple[Annotated[int, Meta(ge=0, le=4095)], ...] = ()
    """Processors that models may run on; all, where none is named."""
    memory_mb: Annotated[int, Meta(ge=1, le=1_048_576)] | None = None
    """No variant that takes more is chosen; ONNX Runtime's arena, which a process has once, ends there."""


NO_LIMITS: Final = Resources()
