"""One end of an exchange: a stream that buffers little, never outlives its user, and says goodbye properly."""

from __future__ import annotations

import asyncio

import anyio

__all__ = ["CHUNK", "Wire", "connect"]

CHUNK = 16_384  # bytes read at once; the reader holds twice as many, and what one more recv brings (256 KB)
_FAREWELL = 2.0  # seconds for the other side to take the last bytes and close
_FIRST_TRY = 5.0  # seconds for an address when there is another one


class Wire:
    """A TCP or Unix stream. Reading and writing raise OSError once the other side is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=0)  # so that `send` returns when the kernel has it all

    async def receive(self) -> bytes:
        """At least one byte, or none at the end of the stream."""
        return await self._reader.read(CHUNK)

    async def send(self, data: bytes) -> None:
        if data:
            self._writer.write(data)
            await self._writer.drain()

    def end(self) -> None:
        """Nothing more is sent; the other direction stays open."""
        if self._writer.can_write_eof() and not self._writer.is_closing():
            self._writer.write_eof()

    async def finish(self) -> None:
        """Ends and closes, having read (and dropped) what still comes: a reset would lose our last bytes."""
        with anyio.move_on_after(_FAREWELL):
            try:
                self.end()
                for _ in range(256):
                    if not await self.receive():
                        break
            except OSError:
                pass
        self.abort()

    def abort(self) -> None:
        self._writer.transport.abort()


async def connect(addresses: list[str], port: int, timeout: float) -> tuple[str, Wire]:
    """A stream to the first of these addresses that answers. Raises OSError (TimeoutError) when none does."""
    failure: OSError = TimeoutError(f"no answer within {timeout:g} s")
    with anyio.move_on_after(timeout):
        for position, address in enumerate(addresses):
            last = position == len(addresses) - 1
            with anyio.move_on_after(timeout if last else min(_FIRST_TRY, timeout / 2)):
                try:
                    return address, Wire(*await asyncio.open_connection(address, port, limit=CHUNK))
                except OSError as error:
                    failure = error
    raise failure
