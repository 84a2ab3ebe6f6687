import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.frames import MAX_PAYLOAD, FrameReader, frame
from agent.ports import MAX_IPC_MESSAGE
from contract.errors import PitheadError


@given(payloads=st.lists(st.binary(max_size=50), max_size=8), cuts=st.lists(st.integers(1, 30)))
def test_payloads_survive_any_cutting_of_the_stream(payloads: list[bytes], cuts: list[int]):
    stream = b"".join(frame(p) for p in payloads)
    reader, seen = FrameReader(), []
    for size in cuts:
        seen += reader.feed(stream[:size])
        stream = stream[size:]
    seen += reader.feed(stream)
    assert seen == payloads
    assert reader.pending == 0


def test_what_is_not_whole_waits():
    reader = FrameReader()
    assert reader.feed(frame(b"abc")[:-1]) == []
    assert reader.pending == 6
    assert reader.feed(b"c") == [b"abc"]


def test_a_header_above_the_limit_is_refused_before_its_payload():
    with pytest.raises(PitheadError, match="too_large"):
        FrameReader(10).feed((11).to_bytes(4, "big"))


def test_too_much_is_not_framed():
    with pytest.raises(PitheadError, match="too_large"):
        frame(bytes(MAX_PAYLOAD + 1))


def test_both_limits_are_one():
    assert MAX_PAYLOAD == MAX_IPC_MESSAGE
