"""The examples run as they stand in the README."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from chat_server import ChatServer, turn

EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_research_task_shows_its_steps_and_answers(tmp_path: Path) -> None:
    output = _run(EXAMPLES / "research.py", cwd=tmp_path)
    assert "→ search" in output
    assert "→ open" in output
    assert output.splitlines()[-1].startswith("Answer: ")


def test_an_embedded_agent_uses_the_programs_own_tools(tmp_path: Path) -> None:
    assert _run(EXAMPLES / "own_tool.py", cwd=tmp_path).startswith("57 (answered after 4 steps")


def test_a_remote_model_drives_the_same_loop_and_leaves_a_trace_to_read(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "port.md").write_text("# Port\nThe port opened in 1931.\n", encoding="utf-8")
    replies = [
        turn(thinking="Look it up.", calls=[("search", '{"query": "port opened"}')]),
        turn(thinking="There it is.", content="In 1931."),
    ]
    with ChatServer(replies) as server:
        arguments = ("remote_model.py", server.url, "some-model", "docs", "When did the port open?")
        output = _run(EXAMPLES / arguments[0], *arguments[1:], cwd=tmp_path)
    assert output.startswith("In 1931.\nanswered, 2 steps")
    (trace,) = (tmp_path / "runs").iterdir()
    steps = _run(EXAMPLES / "read_trace.py", trace, cwd=tmp_path).splitlines()
    assert [line.split()[-1] for line in steps] == ["search", "answer", "1931."]


def test_files_go_into_the_sandbox_and_come_out_of_it(tmp_path: Path) -> None:
    output = _run(EXAMPLES / "python_files.py", cwd=tmp_path)
    assert "{'Mekres': 7.912" in output
    assert "[files: densest.txt (6 bytes)]" in output
    assert "FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'" in output
    assert output.endswith("kept: Mekres\n")


def test_a_page_is_opened_searched_and_pictured_and_a_private_address_refused(tmp_path: Path) -> None:
    output = _run(EXAMPLES / "browse.py", cwd=tmp_path)
    assert "- governor Kektas Ballil" in output
    assert "[screenshot.png: " in output
    assert "refused: http://169.254.169.254/latest/meta-data was not opened" in output


def test_the_mini_model_searches_a_site_opens_its_pages_in_the_browser_and_computes(tmp_path: Path) -> None:
    output = _run(EXAMPLES / "site_search.py", cwd=tmp_path)
    assert output == "0.23 (answered after 6 steps; read Mekres.md, Resnir.md)\n"
