"""Let one other machine, or any, reach a port that listens on this machine's localhost only."""

import asyncio
import contextlib
import ipaddress
import logging
import sys

address, port, allowed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
# Each takes two file descriptors, of which a process often has 1,024 and may have 256.
slots = asyncio.Semaphore(100)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what one side sends, and then that it has ended."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Connect to the port and pass on both ways, until the port's side has ended."""
    try:
        answers, there = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return
    asking = asyncio.create_task(pump(reader, there))
    await pump(answers, writer)
    there.transport.abort()
    writer.close()
    await asking


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve a connection, or refuse it."""
    peer = ipaddress.ip_address(writer.get_extra_info("peername")[0])
    # Processes of this machine can reach the port anyway.
    own = peer.is_loopback or peer == ipaddress.ip_address(address)
    if slots.locked() or not (own or allowed == "any" or peer == ipaddress.ip_address(allowed)):
        writer.close()
        return
    async with slots:
        await serve(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def main() -> None:
    """Serve until this process is ended."""
    # It reports every connection that could not be accepted, at length.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    server = await asyncio.start_server(relay, address, port)
    await server.serve_forever()


asyncio.run(main())
