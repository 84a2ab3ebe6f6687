"""The limit: HTTP parsed by httptools on uvloop, and an answer of the right length; nothing else."""

import asyncio
import sys

import httptools
import uvloop

LENGTH = 380
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % LENGTH + bytes(LENGTH)


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.transport.write(ANSWER)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
