"""The agent's way to its engine: a connection that is made again when the engine was restarted.

The parent process restarts a dead engine; this only waits for its socket. Every call asks here for the runtime of the
moment.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from minmo_runtime.client import RuntimeClient

log = logging.getLogger(__name__)
RETRY_S = 0.1


class EngineLink:
    """One per agent process."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._client: RuntimeClient | None = None
        self._connecting = asyncio.Lock()

    async def runtime(self) -> RuntimeClient:
        """A live connection; waits as long as there is none."""
        async with self._connecting:
            while self._client is None or self._client.is_lost:
                if self._client is not None:
                    lost, self._client = self._client, None
                    await lost.close()
                try:
                    self._client = await RuntimeClient.connect(self._path)
                    log.info("engine connected")
                except OSError:  # not there yet, or again
                    await asyncio.sleep(RETRY_S)
            return self._client

    @property
    def is_connected(self) -> bool:
        return self._client is not None and not self._client.is_lost

    @property
    def num_open_streams(self) -> int:
        return self._client.num_held if self._client is not None else 0

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
