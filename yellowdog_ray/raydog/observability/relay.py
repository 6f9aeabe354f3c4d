"""Let one other machine, or any, reach a port that listens on this machine's localhost only."""

import asyncio
import ipaddress
import sys

address, port, allowed = sys.argv[1], int(sys.argv[2]), sys.argv[3]


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what one side sends, until it ends."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve a connection."""
    peer = ipaddress.ip_address(writer.get_extra_info("peername")[0])
    # Processes of this machine can reach the port anyway.
    own = peer.is_loopback or peer == ipaddress.ip_address(address)
    if not own and allowed != "any" and peer != ipaddress.ip_address(allowed):
        writer.close()
        return
    try:
        there = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))


async def main() -> None:
    """Serve until this process is ended."""
    server = await asyncio.start_server(relay, address, port)
    await server.serve_forever()


asyncio.run(main())
