"""Topics: a device can only ever name itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import topics
from contract.errors import PitheadError
from contract.messages import PriorityClass


@given(st.sampled_from(PriorityClass), st.from_regex(topics.DEVICE_ID, fullmatch=True))
def test_what_a_device_publishes_parses_back(priority: PriorityClass, device: str):
    if device.startswith(topics.SERVICE_PREFIX):
        return
    assert topics.parse_up(topics.records(device, priority)) == (device, priority.value)


@pytest.mark.parametrize(
    "topic",
    [
        "pithead/v1/dev-00000001/down/ack",
        "pithead/v2/dev-00000001/up/health",
        "pithead/v1/short/up/health",
        "pithead/v1/svc-ingest/up/health",
        "pithead/v1/dev-00000001/up/health/more",
        "pithead/v1/+/up/health",
        "",
    ],
)
def test_other_topics_are_refused(topic: str):
    with pytest.raises(PitheadError, match=r"message\.malformed"):
        topics.parse_up(topic)
