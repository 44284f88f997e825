"""The engine process: any `api.Runtime` behind a Unix socket.

`python -m minmo_runtime.server --socket PATH --checkpoint DIR` loads the checkpoint, lowers its own priority (media
goes first), prints `ready` on stdout once it accepts, what it holds on SIGUSR1 (holdings.py), and ends when its parent
is gone, on SIGTERM, or with the socket's folder. A connection that closes takes its streams with it. It knows nothing
of the agent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import msgspec

from minmo_runtime.api import CloseStream, OpenStream, Runtime, RuntimeOverloaded, StreamLost
from minmo_runtime.config import RuntimeConfig
from minmo_runtime.holdings import told
from minmo_runtime.wire import (
    Check,
    Checked,
    ProtocolError,
    StreamEnded,
    StreamRefused,
    decode_request,
    pack,
    read_body,
)

ENGINE_NICENESS = 5  # design §5: lower priority than media
_PARENT_CHECK_S = 1.0
_FORWARD = "forward-"  # a stream's task


class RuntimeServer:
    """Serves `runtime` at `socket_path`; the folder should be private (0700), the socket itself is made 0600."""

    def __init__(self, runtime: Runtime, socket_path: str | Path) -> None:
        self._runtime = runtime
        self._path = Path(socket_path)
        self._server: asyncio.AbstractServer | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._path.unlink(missing_ok=True)
        old_umask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._accept, path=str(self._path))
        finally:
            os.umask(old_umask)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    @property
    def num_streams(self) -> int:
        """Streams whose events are being sent."""
        return sum(task.get_name().startswith(_FORWARD) for task in asyncio.all_tasks())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # stop() ends connections this way; streams are closed in _serve
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forwards: dict[str, asyncio.Task[None]] = {}
        try:
            while (body := await read_body(reader)) is not None:
                request = decode_request(body)
                call_id = request.call_id
                if isinstance(request, Check):
                    writer.write(pack(Checked(call_id=call_id, reason=await self._fault())))
                    continue
                try:
                    await self._runtime.send(request)
                except (RuntimeOverloaded, ValueError) as error:
                    writer.write(pack(StreamRefused(call_id=call_id, reason=str(error))))
                    continue
                except StreamLost:
                    continue  # it failed a moment ago; StreamFailed and StreamEnded are on their way
                if isinstance(request, OpenStream):
                    forwards = {key: task for key, task in forwards.items() if not task.done()}
                    forwards[call_id] = asyncio.create_task(self._forward(call_id, writer), name=f"{_FORWARD}{call_id}")
        except ConnectionError:
            pass  # the agent is gone, in whatever way; whoever watches it knows
        except (ProtocolError, msgspec.ValidationError, msgspec.DecodeError) as error:
            print(f"engine: connection dropped: {error}", file=sys.stderr)
        finally:
            for call_id, task in forwards.items():
                if not task.done():
                    await self._runtime.send(CloseStream(call_id=call_id))
            for task in forwards.values():
                task.cancel()
            await asyncio.gather(*forwards.values(), return_exceptions=True)

    async def _fault(self) -> str:
        """Why the runtime does not work; empty when it does."""
        try:
            await self._runtime.check()
        except Exception as error:
            print(f"engine: not working: {type(error).__name__}: {error}", file=sys.stderr)
            return f"{type(error).__name__}: {error}"
        return ""

    async def _forward(self, call_id: str, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            async for event in self._runtime.events(call_id):
                writer.write(pack(event))
                await writer.drain()
            writer.write(pack(StreamEnded(call_id=call_id)))
            await writer.drain()


async def serve_until_stopped(runtime: Runtime, socket_path: Path) -> None:
    """Serve until SIGTERM or SIGINT, or until the parent process is gone."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    parent = os.getppid()
    server = RuntimeServer(runtime, socket_path)
    await server.start()
    loop.add_signal_handler(signal.SIGUSR1, _tell_holdings, server)
    print("ready", flush=True)
    while not stopped.is_set() and os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), _PARENT_CHECK_S)
    await server.stop()


def _tell_holdings(server: RuntimeServer) -> None:
    print(told({"tasks": len(asyncio.all_tasks()), "streams": server.num_streams}), flush=True)


async def _run(arguments: argparse.Namespace) -> None:
    from minmo_runtime.engine import EngineRuntime, load_engine  # here: the fake and the client must not pay for torch

    engine = load_engine(Path(arguments.checkpoint), arguments.config)
    runtime = EngineRuntime(engine)
    async with runtime:
        # A defect of the engine itself ends the process: the parent starts a clean one, calls go on from their journal.
        tasks = {
            asyncio.create_task(serve_until_stopped(runtime, Path(arguments.socket)), name="serve"),
            asyncio.create_task(runtime.wait_failed(), name="engine-failed"),
        }
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for task in done:
            task.result()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; `config` is a RuntimeConfig, whole: what is not given has its default."""
    parser = argparse.ArgumentParser(description="MinMo engine process")
    parser.add_argument("--socket", required=True, help="Unix socket to serve at")
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder (checkpoint.toml and weights)")
    parser.add_argument("--config", type=_config, default="{}", help="RuntimeConfig as a JSON object")
    parser.add_argument("--niceness", type=int, default=ENGINE_NICENESS)
    return parser.parse_args(words)


def _config(text: str) -> RuntimeConfig:
    try:
        return RuntimeConfig(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    arguments = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.suppress(PermissionError):
        os.nice(arguments.niceness)
    asyncio.run(_run(arguments))


if __name__ == "__main__":
    main()
