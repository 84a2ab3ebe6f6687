"""Triton's configuration of a model, as far as this server has one; its clients read it.

Fields that are not described here are passed over by protobuf, as unknown ones are.
"""

from typing import Final

from agent.engine.serve.proto.build import Table

ENUMS: Final[Table] = {
    "DataType": (
        "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8",
        "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING",
        "TYPE_BF16",
    ),
    "InstanceKind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
    "TimeoutAction": ("REJECT", "DELAY"),
}  # fmt: skip

MESSAGES: Final[Table] = {
    "ModelConfig": (
        "name 1 string",
        "platform 2 string",
        "version_policy 3 VersionPolicy",
        "max_batch_size 4 int32",
        "input 5 many ConfigInput",
        "output 6 many ConfigOutput",
        "instance_group 7 many InstanceGroup",
        "dynamic_batching 11 DynamicBatching of scheduling_choice",
        "ensemble_scheduling 15 Ensemble of scheduling_choice",
        "parameters 14 map ConfigParameter",
        "backend 17 string",
        "response_cache 24 ResponseCache",
    ),
    "ConfigInput": ("name 1 string", "data_type 2 DataType", "dims 4 many int64"),
    "ConfigOutput": ("name 1 string", "data_type 2 DataType", "dims 3 many int64"),
    "ConfigParameter": ("string_value 1 string",),
    "ResponseCache": ("enable 1 bool",),
    "VersionPolicy": (
        "latest 1 LatestVersions of policy_choice",
        "all 2 AllVersions of policy_choice",
        "specific 3 SpecificVersions of policy_choice",
    ),
    "LatestVersions": ("num_versions 1 uint32",),
    "AllVersions": (),
    "SpecificVersions": ("versions 1 many int64",),
    "InstanceGroup": ("name 1 string", "count 2 int32", "kind 4 InstanceKind"),
    "DynamicBatching": (
        "preferred_batch_size 1 many int32",
        "max_queue_delay_microseconds 2 uint64",
        "default_queue_policy 6 QueuePolicy",
    ),
    "Ensemble": ("step 1 many EnsembleStep",),
    "EnsembleStep": (
        "model_name 1 string",
        "model_version 2 int64",
        "input_map 3 map string",
        "output_map 4 map string",
    ),
    "QueuePolicy": (
        "timeout_action 1 TimeoutAction",
        "default_timeout_microseconds 2 uint64",
        "max_queue_size 4 uint32",
    ),
}
