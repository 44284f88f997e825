"""The client while there is no worker, and while a worker is busy with another agent."""

from __future__ import annotations

import asyncio
import socket

import pytest

from telephony.client import WorkerClient, WorkerLost


async def test_absent_worker_is_reported_after_the_timeout_with_its_path(tmp_path):
    with pytest.raises(WorkerLost, match="nobody.sock within 0.2 s"):
        await WorkerClient.connect(tmp_path / "nobody.sock", timeout_s=0.2)


async def test_worker_that_does_not_greet_is_given_up_and_its_socket_closed(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "mute.sock"))
        listener.listen()
        with pytest.raises(WorkerLost):
            await WorkerClient.connect(tmp_path / "mute.sock", timeout_s=0.2)
        connecting = asyncio.create_task(WorkerClient.connect(tmp_path / "mute.sock", timeout_s=5))
        await asyncio.sleep(0.05)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting


async def test_second_agent_waits_until_the_first_has_left(worker_pair):
    near, _ = worker_pair
    first = await WorkerClient.connect(near.socket_path)
    second = asyncio.create_task(WorkerClient.connect(near.socket_path, timeout_s=10))
    await asyncio.sleep(0.3)
    assert not second.done() and not first.lost.is_set()
    await first.close()
    await (await second).close()
