"""MCP servers as people write them: options, settings tables, the command line."""

from __future__ import annotations

from typing import Any

import pytest
from thinkloop.tools.mcp_client import MCP, parse_server, servers_from
from thinkloop.traces.events import ThinkloopError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "a b", "command": ["x"]}, "letters, digits"),
        ({"name": "x"}, "either `command` or `url`"),
        ({"name": "x", "command": ["a"], "url": "http://b"}, "either `command` or `url`"),
        ({"name": "x", "command": "a b"}, "list of texts"),
        ({"name": "x", "url": "http://b", "sandbox": True}, "for a `command`"),
        ({"name": "x", "command": ["a"], "headers": {"a": "b"}}, "for a `url`"),
        ({"name": "x", "url": "http://b", "headers": {"a": "b\r\nc: d"}}, "printable ASCII"),
        ({"name": "x", "command": ["a"], "effect": "maybe"}, '"hint"'),
        ({"name": "x", "command": ["a"], "deadline": 0}, "must be positive"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ThinkloopError, match=said):
        MCP(**options)


def test_servers_come_from_settings_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "abc")
    tables = {
        "files": {"command": "npx -y 'server files'", "env": {"KEY": "${TOKEN}!"}, "sandbox": True, "only": ["read"]},
        "web": {
            "url": "https://example.org/mcp",
            "headers": {"Authorization": "Bearer ${TOKEN}"},
            "allow-hosts": ["a"],
        },
    }
    files, web = servers_from(tables)
    assert (files.name, web.name) == ("files", "web")
    transport = files._transport()
    assert transport.command == ("npx", "-y", "server files")
    assert transport.env == {"KEY": "abc!"}
    assert web._transport().headers == {"Authorization": "Bearer abc"}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"comand": "x"}, "unknown key 'comand'. Known are: command"),
        ({"command": 5}, "`command` must be"),
        ({"command": ["a", 5]}, "`command` must be"),
        ({"command": "a 'b"}, "can't be split"),
        ({"command": "a", "deadline": True}, "`deadline` must be a number"),
        ({"url": "https://a", "headers": {"a": "${NOT_SET_HERE}"}}, "NOT_SET_HERE, which is not set"),
        ("x", "must be a table"),
        ({}, "either `command` or `url`"),
    ],
)
def test_a_wrong_table_is_refused_with_its_name_and_key(table: Any, said: str) -> None:
    with pytest.raises(ThinkloopError) as refused:
        servers_from({"web": table})
    assert said in str(refused.value)
    assert "web" in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://example.org/mcp", "HTTP://10.0.0.1/", "http://localhost.example.org", "http:///"]
)
def test_a_secret_is_not_sent_unencrypted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "abc")
    with pytest.raises(ThinkloopError, match=r"\[mcp.web\]: `headers` .* unencrypted. Use an https address"):
        servers_from({"web": {"url": url, "headers": {"Authorization": "Bearer ${TOKEN}"}}})
    servers_from({"web": {"url": url, "headers": {"Accept-Language": "en"}}})


@pytest.mark.parametrize(
    "url", ["https://example.org", "http://localhost:3000", "http://127.0.0.1/mcp", "http://[::1]:80/"]
)
def test_a_secret_may_go_over_https_or_stay_on_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "abc")
    (web,) = servers_from({"web": {"url": url, "headers": {"Authorization": "Bearer ${TOKEN}"}}})
    assert web._transport().headers == {"Authorization": "Bearer abc"}


def test_servers_come_from_the_command_line() -> None:
    assert parse_server("a=python 'my server.py' --x=1")._transport().command == ("python", "my server.py", "--x=1")
    assert parse_server("b=https://example.org/mcp?x=1")._transport().url == "https://example.org/mcp?x=1"
    for wrong in ("python server.py", "=x", "a="):
        with pytest.raises(ThinkloopError, match="NAME=COMMAND"):
            parse_server(wrong)
