"""The command line, as processes and in place: what it prints, how it ends, and what it says to bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import thinkloop.agent.agent
import thinkloop.agent.run_command
from recorded_runs import record
from thinkloop.agent.cli import RUN_OPTIONS, app
from thinkloop.agent.doctor import available_memory
from thinkloop.agent.replay import Player
from thinkloop.agent.testing import ScriptedModel
from thinkloop.traces.events import RunFinished, RunStarted, Thinking, ToolResult
from thinkloop.traces.reader import TraceReader
from thinkloop.traces.writer import TraceWriter
from typer.testing import CliRunner, Result

SCRIPT: list[dict[str, Any]] = [
    {"thinking": "I search.", "calls": [("search", {"query": "mayor"})]},
    {"thinking": "There it is.", "calls": [("open", {"id": "town.md"})]},
    {"thinking": "I know.", "content": "Ada"},
]
JSON_TYPES = {
    "run_started", "step_started", "thinking", "content", "tool_call", "tool_result", "usage", "limit", "error",
    "context_edited", "run_finished",
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of its own with a small corpus, and no options from outside."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "town.md").write_text("# Town\n\nThe mayor is Ada.\n")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("THINKLOOP_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Lets every model be a scripted one, and keeps what was asked of it."""
    asked: list[dict[str, Any]] = []

    def open_scripted(name: str, **options: Any) -> Any:
        asked.append({"name": name} | options)
        return lambda: ScriptedModel(SCRIPT)

    monkeypatch.setattr(thinkloop.agent.agent, "open_model", open_scripted)
    return asked


def cli(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, list(arguments), **options)


def run(*arguments: str, **options: Any) -> Result:
    return cli("run", "Who is the mayor?", "--corpus", "docs", "--tools", "search,open", *arguments, **options)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thinkloop", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def one_paragraph(text: str) -> bool:
    return text.startswith("Error: ") and "Traceback" not in text and "\n" not in text.strip()


# -- run -------------------------------------------------------------------------------------------------------------


def test_a_run_shows_itself_and_leaves_a_trace_under_runs(opened: list[dict[str, Any]], here: Path) -> None:
    result = run()
    assert result.exit_code == 0
    for part in ("I search.", "query: mayor", "The mayor is Ada.", "sources: town.md", "runs/"):
        assert part in result.stdout
    (trace,) = (here / "runs").iterdir()
    assert TraceReader.open(trace).problems() == []


def test_quiet_prints_the_answer_alone(opened: list[dict[str, Any]]) -> None:
    assert run("--quiet").output == "Ada\n"


def test_json_prints_known_event_types_only_and_ends_with_the_answer(opened: list[dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in run("--json").stdout.splitlines()]
    assert {line["type"] for line in lines} <= JSON_TYPES
    assert [lines[0]["type"], lines[-1]["type"]] == ["run_started", "run_finished"]
    assert (lines[-1]["answer"], lines[-1]["reason"], lines[-1]["sources"]) == ("Ada", "answered", ["town.md"])
    assert lines[-1]["usage"]["completion_tokens"] > 0


def test_the_task_can_come_from_standard_input(opened: list[dict[str, Any]]) -> None:
    result = cli("run", "-", "--tools", "none", "--corpus", "docs", "--json", input="Who is it?\n")
    assert json.loads(result.stdout.splitlines()[0])["task"] == "Who is it?"


def test_without_a_task_the_demo_is_asked_over_the_sample_world(
    opened: list[dict[str, Any]], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thinkloop.agent.run_command, "mini_folder", lambda: here / "mini")
    missing = cli("run", "--tools", "search")
    assert missing.exit_code == 1
    assert "demo question is missing" in missing.stderr
    (here / "docs").rename(here / "world")
    (here / "mini").mkdir()
    (here / "mini" / "demo.txt").write_text("Demo?\n")
    no_world = cli("run", "--tools", "search")
    assert (no_world.exit_code, "sample world is missing" in no_world.stderr) == (1, True)
    (here / "world").rename(here / "mini" / "world")
    result = cli("run", "--tools", "search,open", "--json")
    assert json.loads(result.stdout.splitlines()[0])["task"] == "Demo?"
    assert result.exit_code == 0


def test_a_limit_with_an_answer_is_no_error(opened: list[dict[str, Any]]) -> None:
    result = run("--max-steps", "1", "--json")
    end = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, end["reason"]) == (0, "steps")


def test_options_come_from_flag_then_environment_then_file(
    opened: list[dict[str, Any]], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(*arguments: str) -> int:
        result = run("--json", *arguments)
        return int(json.loads(result.stdout.splitlines()[0])["limits"]["steps"])

    assert steps() == 300
    (here / "thinkloop.toml").write_text('max-steps = 30\nmodel = "from-file"\ntools = ["search"]\n')
    assert steps() == 30
    assert opened[-1]["name"] == "from-file"
    monkeypatch.setenv("THINKLOOP_MAX_STEPS", "20")
    assert steps() == 20
    assert steps("--max-steps", "10") == 10


def test_options_reach_model_and_limits(opened: list[dict[str, Any]]) -> None:
    server = ("--model", "http://x/v1", "--model-name", "k2")
    limits = ("--max-thinking", "9", "--thinking-budget", "90", "--max-tokens", "5000", "--time-limit", "60")
    result = run(*server, *limits, "--seed", "7", "--temperature", "0.5", "--json")
    start = json.loads(result.stdout.splitlines()[0])
    assert (opened[-1]["name"], opened[-1]["model_name"], opened[-1]["seed"]) == ("http://x/v1", "k2", 7)
    assert (opened[-1]["sampling"].temperature, opened[-1]["sampling"].seed) == (0.5, 7)
    wanted = {"thinking_per_step": 9, "thinking": 90, "tokens": 5000, "seconds": 60}
    assert {name: start["limits"][name] for name in wanted} == wanted
    assert [tool["function"]["name"] for tool in start["tools"]] == ["search", "open"]


def test_every_option_of_run_can_stand_in_the_file() -> None:
    import typer.main

    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]  # typer's group isn't typed
    assert {parameter.name for parameter in command.params} - {"task", "unsafe_python", "mcp"} == RUN_OPTIONS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max-stepz = 1", "unknown option 'max-stepz'"),
        ("max-steps = ", "can't be read as TOML"),
        ("seed = {a = 1}", "must be"),
    ],
)
def test_a_wrong_settings_file_is_an_error(opened: list[dict[str, Any]], here: Path, text: str, says: str) -> None:
    (here / "thinkloop.toml").write_text(text)
    result = run()
    assert result.exit_code == 1
    assert one_paragraph(result.stderr)
    assert says in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["run", " "], 1, "task is empty"),
        (["run", "q", "--corpus", "nowhere"], 1, "nowhere"),
        (["run", "q", "--corpus", "empty"], 1, "empty"),
        (["run", "q", "--corpus", "docs", "--model", "unheard-of"], 1, "unheard-of"),
        (["run", "q", "--corpus", "docs", "--model-name", "k2"], 1, "URL"),
        (["run", "q", "--corpus", "docs", "--trace", "taken"], 1, "already holds a trace"),
        (["run", "q", "--corpus", "docs", "--trace", "file"], 1, "is a file"),
        (["run", "q", "--tools", "search,teleport"], 2, "no tool 'teleport'"),
        (["run", "q", "--json", "--quiet"], 2, "exclude each other"),
        (["run", "q", "--unheard-of"], 2, "No such option"),
        (["run", "q", "--max-steps", "0"], 2, "max-steps"),
        (["replay", "nowhere"], 1, "no trace in"),
        (["trace", "show", "docs"], 1, "no trace in"),
        (["trace", "show", "taken", "--step", "9"], 1, "no step 9"),
        (["trace", "ls", "nowhere"], 1, "There is no folder"),
        (["replay"], 2, "Missing argument"),
    ],
)
def test_bad_input_is_one_paragraph_and_a_code(here: Path, arguments: list[str], code: int, says: str) -> None:
    (here / "empty").mkdir()
    (here / "file").touch()
    record(here / "taken")
    result = cli(*arguments)
    assert result.exit_code == code
    assert says in result.stderr
    error = result.stderr.removeprefix("No --corpus is named: searching the sample world that comes with thinkloop.\n")
    assert code == 2 or one_paragraph(error)


def test_debug_shows_where_an_error_comes_from() -> None:
    result = process("run", " ", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_failing_model_is_exit_code_1_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ScriptedModel([{"error": "the server is gone"}])
    monkeypatch.setattr(thinkloop.agent.agent, "open_model", lambda name, **options: lambda: broken)
    result = run("--quiet")
    assert result.exit_code == 1
    assert "the server is gone" in result.stderr
    assert "The trace is in runs/" in result.stderr
    assert broken.closed


# -- interrupts ------------------------------------------------------------------------------------------------------

SLOW = """
import sys
import thinkloop.agent.agent as agent
from thinkloop.agent.testing import ScriptedModel
script = [{"thinking": "hm", "calls": [("search", {"query": "x"})]}, {"delay": 60, "content": "late"}]
agent.open_model = lambda name, **options: lambda: ScriptedModel(script)
from thinkloop.__main__ import main
main()
"""


@pytest.mark.parametrize("mode", ["--json", "--quiet", None])
def test_ctrl_c_stops_at_once_and_leaves_a_whole_trace(here: Path, mode: str | None) -> None:
    command = [sys.executable, "-c", SLOW, "run", "q", "--corpus", "docs", "--tools", "search", "--trace", "t"]
    running = subprocess.Popen([*command, *([mode] if mode else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (here / "t" / "events.jsonl").exists() or b'"step":2' not in (here / "t" / "events.jsonl").read_bytes():
        time.sleep(0.02)
    started = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert running.returncode == 130
    assert b"The trace is in t." in errors
    assert b"Traceback" not in errors
    reader = TraceReader.open("t")
    assert reader.problems() == []
    end = list(reader)[-1].event
    assert isinstance(end, RunFinished)
    assert end.reason == "cancelled"


# -- replay and trace ------------------------------------------------------------------------------------------------


def test_replay_shows_the_run_as_it_was_shown(opened: list[dict[str, Any]]) -> None:
    live = run("--trace", "t").stdout
    replayed = cli("replay", "t")
    assert replayed.exit_code == 0
    assert replayed.stdout == live


def test_replay_needs_neither_model_nor_corpus_nor_torch(here: Path) -> None:
    record(here / "t")
    code = (
        "import sys; sys.argv = ['thinkloop', 'replay', 't', '--json']\n"
        "from thinkloop.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'httpx', 'jsonschema'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["answer"] == "The mayor is Ada."


def test_a_cut_trace_is_shown_as_far_as_it_goes_and_then_complained_of(here: Path) -> None:
    events = record(here / "t") / "events.jsonl"
    events.write_bytes(events.read_bytes()[:-40])
    for command in (["replay", "t"], ["replay", "t", "--json"], ["trace", "show", "t"]):
        result = cli(*command)
        assert result.exit_code == 1
        assert "page of mayor" in result.stdout
        assert "stops before the end of its run" in result.stderr
        assert one_paragraph(result.stderr)


def test_a_damaged_trace_is_shown_up_to_the_damage(here: Path) -> None:
    events = record(here / "t") / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join([*lines[:-3], b"damage\n", *lines[-2:]]))
    result = cli("replay", "t")
    assert result.exit_code == 1
    assert f"damaged at line {len(lines) - 2} " in result.stderr
    assert "page of mayor" in result.stdout


def test_replay_keeps_the_times_of_the_record(tmp_path: Path) -> None:
    ticks = iter([0, 0, 2_000_000_000, 6_000_000_000])
    with TraceWriter.create(tmp_path / "t", ticks=lambda: next(ticks)) as writer:
        writer.write(RunStarted(run_id="", task="", system="", model={}, tools=[], limits={}, sampling={}, version=""))
        writer.write(Thinking(text="word " * 20))
        writer.write(RunFinished(answer="", reason="answered", steps=1, usage={}))
    for speed in (1.0, 4.0):
        slept: list[float] = []
        player = Player(TraceReader.open(tmp_path / "t"), speed=speed, sleep=slept.append)
        events = list(player.events())
        assert sum(slept) == pytest.approx(6 / speed, abs=0.05)
        assert max(slept) <= 2 / speed
        assert "".join(event.text for event in events if isinstance(event, Thinking)) == "word " * 20
        assert player.now() == pytest.approx(6)


def test_trace_show_has_counts_and_times_per_step_and_a_step_in_full(here: Path) -> None:
    record(here / "t")
    result = cli("trace", "show", "t")
    assert result.exit_code == 0
    for part in ("step 1", "context ", "cached)", "thinking)", " ms)", "more lines", "The mayor is Ada."):
        assert part in result.stdout
    one = cli("trace", "show", "t", "--step", "1").stdout
    assert "more lines" not in one
    assert one.count("page of mayor") == 20
    assert "step 2" not in one


def test_trace_ls_lists_runs_with_what_they_gave(here: Path) -> None:
    assert "No traces in" in cli("trace", "ls", "docs").stdout
    record(here / "runs" / "first")
    result = cli("trace", "ls")
    assert result.exit_code == 0
    for part in ("when", "first", "answered", "Who is the mayor?", "The mayor is Ada."):
        assert part in result.stdout


# -- doctor and start-up ---------------------------------------------------------------------------------------------


def test_doctor_reports_each_part_and_fails_only_for_what_is_missing() -> None:
    result = cli("doctor")
    for part in ("python", "torch", "cores", "memory", "sandbox", "mini model", "traces"):
        assert part in result.stdout
    missing = [line for line in result.stdout.splitlines() if line.startswith("NO")]
    assert result.exit_code == (1 if missing else 0)
    assert result.stdout.count("->") >= len(missing)


def test_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4000 kB\n")
    assert available_memory(tmp_path) == 4_096_000
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("3000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("1000\n")
    assert available_memory(tmp_path) == 2000


def test_help_and_version_come_quickly_and_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['thinkloop', 'run', '--help']\n"
        "from thinkloop.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'rich.console', 'httpx', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "THINKLOOP_MODEL" in result.stdout
    assert process("--version").stdout.strip() == "0.1.0"


def test_output_that_cannot_be_encoded_is_replaced(here: Path) -> None:
    with TraceWriter.create(here / "t") as writer:
        writer.write(ToolResult(call_id="c", name="t", content="日本", ok=True))
        writer.write(RunFinished(answer="é", reason="answered", steps=1, usage={}))
    result = process("replay", "t", env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert result.returncode == 0
    assert "??" in result.stdout
