"""All messages and calls of ``inference.GRPCInferenceService``, and of gRPC's health check.

Names and numbers are those of the public protocol: KServe's Open Inference Protocol, v2, and the
extensions that Triton documents. Where the two differ (loading and unloading a model) the fields
of both stand here; their numbers do not collide on the way out, and ``grpc_calls`` tells them
apart on the way in.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from agent.engine.serve.proto import config
from agent.engine.serve.proto.build import Table, classes

PACKAGE: Final = "inference"
SERVICE: Final = "inference.GRPCInferenceService"

_DURATIONS: Final = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
)  # fmt: skip
_TENSOR: Final = (
    "name 1 string",
    "datatype 2 string",
    "shape 3 many int64",
    "parameters 4 map InferParameter",
    "contents 5 InferTensorContents",
)

MESSAGES: Final[Table] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("live 1 bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("ready 1 bool",),
    "ModelReadyRequest": ("name 1 string", "version 2 string"),
    "ModelReadyResponse": ("ready 1 bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("name 1 string", "version 2 string", "extensions 3 many string"),
    "ModelMetadataRequest": ("name 1 string", "version 2 string"),
    "ModelMetadataResponse": (
        "name 1 string",
        "versions 2 many string",
        "platform 3 string",
        "inputs 4 many TensorMetadata",
        "outputs 5 many TensorMetadata",
    ),
    "TensorMetadata": ("name 1 string", "datatype 2 string", "shape 3 many int64"),
    # --- inference
    "InferParameter": (
        "bool_param 1 bool of parameter_choice",
        "int64_param 2 int64 of parameter_choice",
        "string_param 3 string of parameter_choice",
        "double_param 4 double of parameter_choice",
        "uint64_param 5 uint64 of parameter_choice",
    ),
    "InferTensorContents": (
        "bool_contents 1 many bool",
        "int_contents 2 many int32",
        "int64_contents 3 many int64",
        "uint_contents 4 many uint32",
        "uint64_contents 5 many uint64",
        "fp32_contents 6 many float",
        "fp64_contents 7 many double",
        "bytes_contents 8 many bytes",
    ),
    "InferInputTensor": _TENSOR,
    "InferRequestedOutputTensor": ("name 1 string", "parameters 2 map InferParameter"),
    "InferOutputTensor": _TENSOR,
    "ModelInferRequest": (
        "model_name 1 string",
        "model_version 2 string",
        "id 3 string",
        "parameters 4 map InferParameter",
        "inputs 5 many InferInputTensor",
        "outputs 6 many InferRequestedOutputTensor",
        "raw_input_contents 7 many bytes",
    ),
    "ModelInferResponse": (
        "model_name 1 string",
        "model_version 2 string",
        "id 3 string",
        "parameters 4 map InferParameter",
        "outputs 5 many InferOutputTensor",
        "raw_output_contents 6 many bytes",
    ),
    "ModelStreamInferResponse": ("error_message 1 string", "infer_response 2 ModelInferResponse"),
    # --- what a model is and has done
    "ModelConfigRequest": ("name 1 string", "version 2 string"),
    "ModelConfigResponse": ("config 1 ModelConfig",),
    "ModelStatisticsRequest": ("name 1 string", "version 2 string"),
    "ModelStatisticsResponse": ("model_stats 1 many ModelStatistics",),
    "ModelStatistics": (
        "name 1 string",
        "version 2 string",
        "last_inference 3 uint64",
        "inference_count 4 uint64",
        "execution_count 5 uint64",
        "inference_stats 6 InferStatistics",
        "batch_stats 7 many BatchStatistics",
    ),
    "StatisticDuration": ("count 1 uint64", "ns 2 uint64"),
    "InferStatistics": tuple(f"{name} {i} StatisticDuration" for i, name in enumerate(_DURATIONS, 1)),
    "BatchStatistics": (
        "batch_size 1 uint64",
        "compute_input 2 StatisticDuration",
        "compute_infer 3 StatisticDuration",
        "compute_output 4 StatisticDuration",
    ),
    # --- the repository
    "ModelRepositoryParameter": (
        "bool_param 1 bool of parameter_choice",
        "int64_param 2 int64 of parameter_choice",
        "string_param 3 string of parameter_choice",
        "bytes_param 4 bytes of parameter_choice",
    ),
    "RepositoryIndexRequest": ("repository_name 1 string", "ready 2 bool"),
    "RepositoryIndexResponse": ("models 1 many ModelIndex",),
    "ModelIndex": ("name 1 string", "version 2 string", "state 3 string", "reason 4 string"),
    "RepositoryModelLoadRequest": (
        "repository_name 1 string",  # KServe's model_name
        "model_name 2 string",
        "parameters 3 map ModelRepositoryParameter",
    ),
    "RepositoryModelLoadResponse": ("model_name 1 string", "isLoaded 2 bool"),
    "RepositoryModelUnloadRequest": (
        "repository_name 1 string",
        "model_name 2 string",
        "parameters 3 map ModelRepositoryParameter",
    ),
    "RepositoryModelUnloadResponse": ("model_name 1 string", "isUnloaded 2 bool"),
    # --- shared memory
    "SystemSharedMemoryStatusRequest": ("name 1 string",),
    "SystemSharedMemoryStatusResponse": ("regions 1 map SystemRegion",),
    "SystemRegion": ("name 1 string", "key 2 string", "offset 3 uint64", "byte_size 4 uint64"),
    "SystemSharedMemoryRegisterRequest": (
        "name 1 string",
        "key 2 string",
        "offset 3 uint64",
        "byte_size 4 uint64",
    ),
    "SystemSharedMemoryRegisterResponse": (),
    "SystemSharedMemoryUnregisterRequest": ("name 1 string",),
    "SystemSharedMemoryUnregisterResponse": (),
    "CudaSharedMemoryStatusRequest": ("name 1 string",),
    "CudaSharedMemoryStatusResponse": ("regions 1 map CudaRegion",),
    "CudaRegion": ("name 1 string", "device_id 2 uint64", "byte_size 3 uint64"),
    "CudaSharedMemoryRegisterRequest": (
        "name 1 string",
        "raw_handle 2 bytes",
        "device_id 3 int64",
        "byte_size 4 uint64",
    ),
    "CudaSharedMemoryRegisterResponse": (),
    "CudaSharedMemoryUnregisterRequest": ("name 1 string",),
    "CudaSharedMemoryUnregisterResponse": (),
    # --- settings
    "TraceSettingRequest": ("settings 1 map TraceValue", "model_name 2 string"),
    "TraceSettingResponse": ("settings 1 map TraceValue",),
    "TraceValue": ("value 1 many string",),
    "LogSettingsRequest": ("settings 1 map LogValue",),
    "LogSettingsResponse": ("settings 1 map LogValue",),
    "LogValue": (
        "bool_param 1 bool of parameter_choice",
        "uint32_param 2 uint32 of parameter_choice",
        "string_param 3 string of parameter_choice",
    ),
}

CALLS: Final = (
    "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelConfig",
    "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting",
    "LogSettings",
)  # fmt: skip
"""All but ``ModelStreamInfer``, the one that streams: ``ModelInferRequest`` in, ``ModelStreamInferResponse``
out. Each takes ``<name>Request`` and answers ``<name>Response``."""

CLASSES: Final[Mapping[str, Any]] = classes(PACKAGE, {**MESSAGES, **config.MESSAGES}, config.ENUMS)


class Health(NamedTuple):
    """``grpc.health.v1.Health/Check``, which Kubernetes and load balancers ask."""

    path: str
    request: Any
    response: Any


def health() -> Health:
    """Return its messages."""
    package = "grpc.health.v1"
    made = classes(
        package,
        {"HealthCheckRequest": ("service 1 string",), "HealthCheckResponse": ("status 1 ServingStatus",)},
        {"ServingStatus": ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")},
    )
    return Health(f"/{package}.Health/Check", made["HealthCheckRequest"], made["HealthCheckResponse"])
