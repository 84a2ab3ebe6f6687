"""The messages of the Open Inference Protocol over gRPC: names, numbers and types, as facts.

``messages`` and ``config`` are tables of them, ``build`` makes classes of tables. Nothing is
generated, and nothing is put into protobuf's common pool, so that a process may hold any other
description of the same messages beside this one.
"""
