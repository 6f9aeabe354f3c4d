"""The way to an SSH server: bastions, and what the user's settings say."""

from __future__ import annotations

import getpass
import re
from pathlib import Path

import pytest

from yellowdog_ray.errors import SpecError, TunnelError
from yellowdog_ray.utils._ssh.route import Hop, Login, check_jump, route


def way(config: Path, text: str, **changes: str | int | None) -> list[Hop]:
    config.write_text(text)
    values = {"host": "head", "user": "ray", "ssh_config": str(config), **changes}
    return route(Login(**values))  # type: ignore[arg-type]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config"


def test_without_settings() -> None:
    """Without settings it is the address itself, port 22."""
    assert route(Login("192.0.2.1", "ray")) == [Hop("192.0.2.1", 22, "ray", "192.0.2.1", (), None)]
    assert route(Login("::1", "ray", 2222))[0].where == "[::1]:2222"


def test_settings(config: Path) -> None:
    """Address, port, keys and the name for host keys are the settings'; what is given counts more."""
    text = (
        "Host head\n HostName 10.0.0.1\n Port 2200\n User other\n IdentityFile /a\n IdentityFile /b\n"
        " HostKeyAlias my-head\nHost *\n IdentityFile /c\n"
    )
    (hop,) = way(config, text)
    assert hop == Hop("10.0.0.1", 2200, "ray", "my-head", ("/a", "/b", "/c"), None)
    (hop,) = way(config, text, port=22)
    assert hop.port == 22


def test_jumps(config: Path) -> None:
    """Bastions come first, with their own settings, also those of a bastion behind another one."""
    text = (
        "Host head\n ProxyJump second\nHost second\n HostName 10.0.0.2\n ProxyJump someone@first:2201\n"
        "Host first\n User nobody\n IdentityFile /first\n"
    )
    assert [(hop.host, hop.port, hop.user) for hop in way(config, text)] == [
        ("first", 2201, "someone"),
        ("10.0.0.2", 22, getpass.getuser()),
        ("head", 22, "ray"),
    ]
    # What is given counts more, and what follows in a list is reached through what is before it.
    assert [hop.host for hop in way(config, text, jump="first,second")] == ["first", "10.0.0.2", "head"]
    assert [hop.host for hop in way(config, text, jump="none")] == ["head"]
    assert [hop.host for hop in way(config, "Host *\n ProxyJump none\n")] == ["head"]
    assert [hop.host for hop in way(config, "Host *\n ProxyJump me@bastion\n")] == ["bastion", "head"]


def test_commands(config: Path) -> None:
    """A ProxyCommand is taken with its words filled in; not where there is a bastion."""
    text = "Host head\n ProxyCommand nc %h %p\n"
    assert way(config, text)[-1].command == "nc head 22"
    assert way(config, text, port=2222)[-1].command == "nc head 2222"
    assert way(config, text, jump="bastion")[-1].command is None
    assert way(config, "Host head\n ProxyCommand none\n")[-1].command is None


def test_settings_that_are_of_no_use(config: Path) -> None:
    """Settings that cannot be read or go in circles are named."""
    with pytest.raises(TunnelError, match="circles"):
        way(config, "Host head\n ProxyJump other\nHost other\n ProxyJump head\n")
    unusable = rf"Your SSH settings in {re.escape(str(config))} cannot be used: "
    for text, said in (
        ("Host head\n Port abc\n", "Port must be a number from 1 to 65535, not 'abc'"),
        ("Host head\n Port 65536\n", "Port must be"),
        ("Host head\n ProxyJump a:b:c\n", "ProxyJump must be like .*, not 'a:b:c'"),
        ("Host head\n ProxyJump other\nHost other\n Port x\n", "Port must be"),
        ('Host "head\n', "Unparsable host"),
    ):
        with pytest.raises(TunnelError, match=unusable + said):
            way(config, text)
    with pytest.raises(TunnelError, match="cannot be read"):
        route(Login("head", "ray", ssh_config=str(config.with_name("missing"))))


@pytest.mark.parametrize(
    ("jump", "expected"),
    [
        ("bastion", [(None, "bastion", None)]),
        ("me@Bastion:2222", [("me", "Bastion", 2222)]),
        ("ssh://me@bastion:2222", [("me", "bastion", 2222)]),
        ("[::1]:2222", [(None, "::1", 2222)]),
        ("a, b@c", [(None, "a", None), ("b", "c", None)]),
    ],
)
def test_jump_lists(jump: str, expected: list[tuple[str | None, str, int | None]]) -> None:
    """They are read as ssh reads them."""
    assert check_jump(jump) == expected


@pytest.mark.parametrize(
    "bad",
    ["-oProxyCommand=x", "a b", "a;b", "$(id)", "`id`", "a|b", "a&b", "a'b", 'a"b', "a\nb", "a\x7f", "a\\"],
)
def test_names_that_a_shell_could_take_for_its_own(bad: str) -> None:
    """A ProxyCommand is run by a shell: what is no address and no user is refused before it."""
    for arguments in ((bad, "ray"), ("head", bad)):
        with pytest.raises(SpecError, match="is refused"):
            Login(*arguments)
    for fine in ("head.example", "192.0.2.1", "fe80::1%eth0", "kopf_1", "köpfchen"):
        assert Login(fine, "DOMAIN\\me.too@there").host == fine


@pytest.mark.parametrize(
    "jump",
    [
        "a;b",
        "$(id)",
        "me`id`@bastion",
        "a&b",
        "a|b",
        "",
        "a,,b",
        "a b",
        "-oProxyCommand=evil",
        "me@",
        "host:port",
        "host/path",
    ],
)
def test_jump_lists_that_are_none(jump: str) -> None:
    """What is no list of servers is refused, options of ssh above all."""
    with pytest.raises(SpecError, match="jump must be like"):
        check_jump(jump)
