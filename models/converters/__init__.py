"""Programs that turn other frameworks' models into ONNX.

Each runs by its path in an interpreter that has the framework and its
converter and nothing of this project, so none of them imports anything of
the house. One JSON request on standard input; one JSON line, the last on
standard output, is the answer. Beside the model each writes ``check.npz``:
inputs as ``in:<n>`` and what the original made of them as ``out:<n>``, in the
order of the model's tensors, rows on the first axis.
"""
