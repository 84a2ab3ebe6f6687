"""`host-health`: an autoencoder on the device's own vital signs, fitted to each device."""

from typing import Final

from contract.manifest import Channel

SAMPLE_RATE_HZ: Final = 2.0

_LOG_RATE: Final = "log10(1 + B/s)"

CHANNELS: Final = (
    Channel(name="cpu_percent", unit="%", minimum=0.0, maximum=100.0),
    Channel(name="memory_percent", unit="%", minimum=0.0, maximum=100.0),
    Channel(name="disk_read_log", unit=_LOG_RATE, minimum=0.0, maximum=15.0),
    Channel(name="disk_write_log", unit=_LOG_RATE, minimum=0.0, maximum=15.0),
    Channel(name="net_log", unit=_LOG_RATE, minimum=0.0, maximum=15.0),
    Channel(name="pressure_cpu", unit="%", minimum=0.0, maximum=100.0),
    Channel(name="pressure_io", unit="%", minimum=0.0, maximum=100.0),
    Channel(name="pressure_memory", unit="%", minimum=0.0, maximum=100.0),
    Channel(name="load_per_core", unit="1", minimum=0.0, maximum=10000.0),
)
"""What the agent's ``system`` source delivers, in the order of the model's input.

Byte rates span nine decades and the pipeline only shifts and scales, so the
source takes their logarithm: ``log10(1 + bytes per second)`` since the sample
before, summed over whole disks, or over all interfaces but the loopback, both
directions. ``pressure_*`` is ``some avg10`` of ``/proc/pressure``, 0 where the
kernel has none. ``load_per_core`` is the one-minute load over the number of cores.
"""
