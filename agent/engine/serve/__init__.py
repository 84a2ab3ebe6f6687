"""Serving on the device: the Open Inference Protocol v2, without a control plane where none is wanted.

Who calls whom, from the wire inwards::

    http (bytes) > rest (routes, status codes) > codec (bodies)
                                               > service (use cases) > served, runner > inference.session
                   gRPC and MQTT enter here  --^                      > repository (where models come from)

``requests`` holds the values that cross the middle; ``service.Service`` is what
every protocol calls, on the thread of its event loop only.
"""
