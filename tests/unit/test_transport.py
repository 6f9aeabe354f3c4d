"""The way to the API that the environment knows of: proxies are for elsewhere, and never see a local key."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from yellowdog_ray.errors import PlatformError
from yellowdog_ray.local import LocalControlPlane
from yellowdog_ray.raydog.specs import Credentials
from yellowdog_ray.raydog.transport import Operation, Transport


class Proxy:
    """What stands where a proxy would; it notes the first line that it is sent, and refuses."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(4096).split(b"\r\n")[0].decode())
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    def close(self) -> None:
        # Closing alone would leave the thread waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that the environment tells of, without exceptions."""
    proxy = Proxy()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_local_platform_is_called_without_a_proxy(proxy: Proxy, host: str) -> None:
    with LocalControlPlane() as platform:
        url = platform.url.replace("127.0.0.1", host)
        transport = Transport(Credentials(key_id=platform.key_id, key_secret=platform.secret, api_url=url))
        read = transport.client.application_client.get_application_details
        assert transport.call("ask who this is", read, Operation(5)).id
        transport.close()
    assert proxy.asked == []


def test_another_host_is_called_through_the_proxy(proxy: Proxy) -> None:
    transport = Transport(Credentials(key_id="id", key_secret="secret", api_url="https://yd.invalid"))
    with pytest.raises(PlatformError):
        transport.call(
            "ask who this is", transport.client.application_client.get_application_details, Operation(0.5)
        )
    transport.close()
    assert {line.rpartition(" ")[0] for line in proxy.asked} == {"CONNECT yd.invalid:443"}
