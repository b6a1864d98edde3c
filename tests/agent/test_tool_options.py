"""The options that say which tools a run has: what is offered, what the person is told, what is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import thinkloop.agent.agent
from search_server import SearchServer
from thinkloop.agent.cli import app
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools.mcp_client import MCP
from thinkloop.traces.events import Error, RunStarted, ToolResult
from thinkloop.traces.reader import TraceReader
from typer.testing import CliRunner, Result

anyio_test = pytest.mark.anyio


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "town.md").write_text("# Town\n\nThe mayor is Ada.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in [name for name in os.environ if name.startswith("THINKLOOP_")]:
        monkeypatch.delenv(name)
    return tmp_path


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, Any]], *options: str) -> Result:
    """A run in which the model makes these calls, then answers. Its trace is in `t`."""
    script = [{"calls": calls}, {"content": "Ada"}] if calls else [{"content": "Ada"}]
    monkeypatch.setattr(thinkloop.agent.agent, "open_model", lambda *_, **__: lambda: ScriptedModel(script))
    return cli("run", "Who is the mayor?", "--trace", "t", *options)


def offered() -> list[str]:
    (start,) = [event for event in TraceReader.open("t").events() if isinstance(event, RunStarted)]
    return [tool["function"]["name"] for tool in start.tools]


def results() -> list[ToolResult]:
    return [event for event in TraceReader.open("t").events() if isinstance(event, ToolResult)]


def test_a_function_of_ones_own_is_a_tool_by_its_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "mytools.py").write_text(
        'def tide(port: str) -> str:\n    """The tide at a port."""\n    return f"high at {port}"\n'
    )
    result = run(monkeypatch, [("tide", {"port": "Tarbul"})], "--tools", "search,mytools:tide", "--corpus", "docs")
    assert result.exit_code == 0, result.output
    assert offered() == ["search", "tide", "read_result"]
    assert results()[0].content == "high at Tarbul"


@pytest.mark.parametrize(
    ("tools", "says"),
    [("absent:tide", "absent"), ("teleport", "there is no tool 'teleport'"), ("mytools:none", "none")],
)
def test_a_tool_that_is_not_there_is_named(here: Path, tools: str, says: str) -> None:
    (here / "mytools.py").write_text("def tide(port: str) -> str:\n    return port\n")
    result = cli("run", "q", "--tools", tools)
    assert result.exit_code != 0
    assert says in result.output
    assert "Traceback" not in result.output


def test_python_without_a_sandbox_is_loud_on_the_screen_and_in_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, [("python", {"code": "1 + 1"})], "--tools", "python", "--unsafe-python")
    assert "WITHOUT A SANDBOX" in " ".join(result.stdout.split())
    notes = [event.message for event in TraceReader.open("t").events() if isinstance(event, Error)]
    assert "WITHOUT A SANDBOX" in notes[0]
    assert results()[0].record["isolation"] == "none"
    assert results()[0].content == "2"


def test_neither_file_nor_environment_can_take_the_sandbox_away(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINKLOOP_UNSAFE_PYTHON", "1")
    run(monkeypatch, [("python", {"code": "1 + 1"})], "--tools", "python")
    assert results()[0].record["isolation"] == "bubblewrap"
    (here / "thinkloop.toml").write_text("unsafe-python = true\n")
    result = cli("run", "q")
    assert result.exit_code == 1
    assert "unknown option 'unsafe-python'" in result.stderr


def test_files_are_given_to_python_and_taken_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "data.csv").write_text("a,b\n1,2\n")
    code = "text = open('data.csv').read(); open('out.txt', 'w').write(text.upper())"
    run(monkeypatch, [("python", {"code": code})], "--tools", "python", "--file", "data.csv", "--keep", "results")
    assert (here / "results" / "out.txt").read_text() == "A,B\n1,2\n"
    saved = cli("trace", "files", "t", "--to", "saved")
    (line,) = saved.stdout.splitlines()
    assert "out.txt" in line
    (path,) = (here / "saved").iterdir()
    assert path.read_text() == "A,B\n1,2\n"


def test_long_output_of_python_is_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "for i in range(5000): print(f'line {i}')"
    script = [
        {"calls": [("python", {"code": code})]},
        {"calls": [("read_result", {"call": "functions.python:0", "find": "line 2500"})]},
        {"content": "done"},
    ]
    monkeypatch.setattr(thinkloop.agent.agent, "open_model", lambda *_, **__: lambda: ScriptedModel(script))
    assert cli("run", "q", "--tools", "python", "--trace", "t").exit_code == 0
    first, second = results()
    assert 'read on with read_result(call="functions.python:0", line=' in first.content
    assert second.content.splitlines()[1:] == ["2501: line 2500"]


def test_the_web_is_searched_where_a_provider_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with SearchServer() as server:
        calls = [("search", {"query": "harbour"})]
        result = run(monkeypatch, calls, "--tools", "search,open", "--web", f"searxng={server.url}")
    assert result.exit_code == 0, result.output
    assert results()[0].ok, results()[0].content
    assert results()[0].record["sources"] == ["searxng"]


@pytest.mark.parametrize(
    ("web", "says"), [("altavista", "There is no search provider 'altavista'"), ("brave", "BRAVE_API_KEY")]
)
def test_a_provider_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch, web: str, says: str) -> None:
    monkeypatch.delenv("BRAVE_API_KEY", raising=False)
    result = cli("run", "q", "--web", web)
    assert result.exit_code == 1
    assert says in result.stderr


def test_a_folder_is_indexed_and_only_what_changed_again(here: Path) -> None:
    assert "1 added" in cli("index", "docs").stdout
    (here / "docs" / "harbour.md").write_text("# Harbour\n")
    second = cli("index", "docs").stdout
    assert "1 added" in second
    assert "1 as they were" in second


def test_the_other_engine_is_had_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1 added" in cli("index", "docs", "--engine", "tantivy").stdout
    options = ("--tools", "search", "--corpus", "docs", "--engine", "tantivy")
    assert run(monkeypatch, [("search", {"query": "mayor"})], *options).exit_code == 0
    assert "town.md:3: The mayor is Ada." in results()[0].content


def test_servers_stand_in_the_settings_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Path(__file__).parents[1] / "mcp_servers" / "plain.py"
    command = json.dumps([sys.executable, str(server)])
    (here / "thinkloop.toml").write_text(f'tools = ["none"]\n[mcp.plain]\ncommand = {command}\n')
    assert "may use the MCP server 'plain'" in cli("trust").stdout
    result = run(monkeypatch, [])
    assert result.exit_code == 0, result.output
    assert all(name.startswith(("plain_", "read_result")) for name in offered())
    assert len(offered()) > 1


def test_servers_that_are_no_tables_are_refused(here: Path) -> None:
    (here / "thinkloop.toml").write_text("mcp = 3\n")
    assert "MCP servers are tables" in cli("run", "q").stderr


@anyio_test
async def test_the_tools_are_offered_to_other_programs(here: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "thinkloop",
        "mcp",
        "--tools",
        "search,open,python",
        "--corpus",
        str(here / "docs"),
    ]
    async with MCP(name="own", command=command, deadline=60) as server:
        tools = {tool.name: tool for tool in server.tools()}
        assert sorted(tools) == ["own_open", "own_python", "own_search"]
        assert "The mayor is Ada." in (await tools["own_open"].call({"id": "town.md"})).content
        assert (await tools["own_python"].call({"code": "6 * 7"})).content == "42"


HARMFUL = {
    '[mcp.x]\ncommand = ["sh", "-c", "touch owned"]': "use the MCP server 'x' (['sh', '-c', 'touch owned'])",
    '[mcp.x]\nurl = "https://evil.example"': "use the MCP server 'x' (https://evil.example)",
    'tools = ["search", "./evil.py:x"]': "run the code of './evil.py:x'",
    'tools = "search,evil:x"': "run the code of 'evil:x'",
    'model = "https://evil.example/v1"': "send the task, and a key, to https://evil.example/v1",
    'web = "searxng=https://evil.example"': "send queries to https://evil.example",
    'allow-host = ["localhost:80"]': "reach the private hosts localhost:80",
    'allow_host = ["localhost:80"]': "reach the private hosts localhost:80",
    'file = ["/etc/shadow"]': "read '/etc/shadow'",
    'corpus = ["../other"]': "read '../other'",
    'keep = "/root/.config/autostart"': "write to '/root/.config/autostart'",
    'trace = "../../t"': "write to '../../t'",
}


@pytest.mark.parametrize("text", HARMFUL)
def test_a_settings_file_that_reaches_outside_counts_only_when_trusted(
    here: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (here / "thinkloop.toml").write_text(text)
    result = run(monkeypatch, [])
    assert result.exit_code == 1
    assert f"is not trusted, and it would {HARMFUL[text]}" in result.stderr
    assert not (here / "owned").exists()
    assert HARMFUL[text] in cli("trust").stdout
    assert "is not trusted" not in run(monkeypatch, []).stderr
    (here / "thinkloop.toml").write_text(text + "\n")
    assert "is not trusted" in run(monkeypatch, []).stderr


def test_a_link_inside_does_not_lead_a_settings_file_outside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "inside").symlink_to("/etc")
    (here / "thinkloop.toml").write_text('corpus = ["inside"]\n')
    assert "would read 'inside'" in run(monkeypatch, []).stderr


def test_a_harmless_settings_file_needs_no_trust(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "thinkloop.toml").write_text(
        'tools = ["search", "open"]\ncorpus = ["docs"]\nmax-steps = 9\nweb = "brave"\n'
    )
    monkeypatch.setenv("BRAVE_API_KEY", "k")
    assert run(monkeypatch, []).exit_code == 0


def test_a_file_that_others_can_write_cannot_be_trusted(here: Path) -> None:
    (here / "thinkloop.toml").write_text('tools = "evil:x"\n')
    (here / "thinkloop.toml").chmod(0o666)
    result = cli("trust")
    assert result.exit_code == 1
    assert "can be written by others" in result.stderr
