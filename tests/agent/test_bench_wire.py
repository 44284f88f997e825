"""The media bench's arithmetic on a socket of its own: arrivals, gaps, sound or silence, delays of clicks."""

from __future__ import annotations

import os
import socket
import time

import pytest

from agent.bench_media import _shares
from agent.bench_wire import Arrivals, Clicker, RtpReader, cpu_s, delays_ms, rtp_address


def test_gaps_and_silence_are_counted_from_the_given_time_on():
    arrivals = Arrivals([(1.0, True), (1.02, True), (1.04, False), (1.1, True)])
    assert arrivals.gaps_ms(1.02) == pytest.approx([20, 60])
    assert arrivals.silent(1.0) == 1 and arrivals.onsets_s() == [1.1]


def test_a_delay_is_from_a_click_to_the_first_sound_before_the_next_click():
    assert delays_ms([1.0, 1.5, 2.0], [1.03, 2.5]) == pytest.approx([30])


def test_clicks_that_are_sent_are_read_with_the_kernels_time_stamps():
    source, target = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with source, target:
        source.bind(("127.0.0.1", 0))
        target.bind(("127.0.0.1", 0))
        reader, clicker = RtpReader([target]), Clicker(source, target.getsockname())
        reader.start()
        clicker.start()
        while len(reader.arrivals[0].packets) < 30:
            time.sleep(0.02)
        clicker.stop()
        reader.stop()
    onset, *_later = reader.arrivals[0].onsets_s()  # the loop above may be late, and another click in
    assert 0 <= onset - clicker.sent_s[0] < 0.4


def test_the_address_of_the_audio_is_read_from_the_answer():
    assert rtp_address("SIP/2.0 200 OK\r\n\r\nv=0\r\nc=IN IP4 10.0.0.7\r\nm=audio 4004 RTP/AVP 0\r\n") == (
        "10.0.0.7",
        4004,
    )
    with pytest.raises(ValueError, match="no audio"):
        rtp_address("SIP/2.0 200 OK\r\n\r\n")


def test_cpu_time_of_a_process_is_what_it_says_itself():
    own = os.times()
    assert cpu_s(os.getpid()) == pytest.approx(own.user + own.system, abs=0.2)


class _Worker:
    def __init__(self, max_calls: int) -> None:
        self.ready = {"max_calls": max_calls}


def test_calls_fill_one_worker_after_another_and_none_is_without_one():
    assert _shares(10, [_Worker(4), _Worker(4), _Worker(4)]) == [4, 4, 2]
    with pytest.raises(AssertionError, match="3 calls have no worker"):
        _shares(7, [_Worker(4)])
