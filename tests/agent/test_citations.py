"""Citations: `[id:L12-L15]` holds when these lines were shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from thinkloop.agent.citations import Shown
from thinkloop.traces.events import Json, ToolResult

import thinkloop as tl
from thinkloop.testing import ScriptedModel


def opened(content: str = "", ok: bool = True, **record: object) -> ToolResult:
    return ToolResult(call_id="c", name="open", content=content, ok=ok, record=dict(record))


def problems(shown: Shown, answer: str) -> list[str]:
    return [citation.problem for citation in shown.check(answer)]


@pytest.fixture
def shown() -> Shown:
    shown = Shown()
    shown.note(opened(document="a.md", title="Ada", lines=[[1, 20], [30, 31]]))
    return shown


def test_a_citation_of_lines_that_were_shown_holds(shown: Shown) -> None:
    assert problems(shown, "Yes [a.md:L3] and [a.md:L12-L15], [a.md:L30–31].") == [""] * 3


def test_a_page_cannot_pass_for_another_by_its_title() -> None:
    shown = Shown()
    shown.note(opened(document="https://evil.example/x", title="https://good.example/page", lines=[[1, 9]]))
    assert problems(shown, "[https://good.example/page:L1-L2]") == ["this document was not opened"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("[b.md:L1]", "this document was not opened"),
        ("[a.md:L18-L22]", "line 21 was not shown"),
        ("[a.md:L0]", "line 0 was not shown"),
        ("[a.md:L9-L3]", "its last line comes before its first"),
        ("[a.md:L1-L999999999]", "line 21 was not shown"),
    ],
)
def test_a_citation_of_anything_else_does_not(shown: Shown, answer: str, problem: str) -> None:
    assert problems(shown, answer) == [problem]


def test_what_is_no_citation_is_left_alone(shown: Shown) -> None:
    assert shown.check("[1], [a.md], a[0:L], [x:Ly], list[int], [\n:L3], ]:L3[") == []
    assert shown.check("[" * 100_000) == []


def test_each_citation_counts_once_and_their_number_is_bounded(shown: Shown) -> None:
    assert len(shown.check("[a.md:L3] [a.md:L3]")) == 1
    assert len(shown.check(" ".join(f"[a.md:L{line}]" for line in range(5000)))) == 200


def test_a_result_that_was_cut_shows_only_the_lines_that_are_left() -> None:
    shown = Shown()
    shown.note(opened("a (9 lines)\n1: one\n2: two\n[… left out …]\n9: nine", document="a", lines=[[1, 9]]), cut=True)
    assert problems(shown, "[a:L1-L2] [a:L5] [a:L9]") == ["", "line 5 was not shown", ""]


@pytest.mark.parametrize(
    "lines", [None, "all", [1, 2], [["1", 2]], [[2, 1]], [[1, 10**12]], [[1]], {"a": 1}, [[True, 3]]]
)
def test_records_of_another_form_show_nothing(lines: object) -> None:
    shown = Shown()
    shown.note(opened(document="a", lines=lines))
    assert problems(shown, "[a:L2]") in (["line 2 was not shown"], [""] if lines == [[True, 3]] else [])


def test_failed_results_show_nothing() -> None:
    shown = Shown()
    shown.note(opened(ok=False, document="a", lines=[[1, 3]]))
    assert problems(shown, "[a:L2]") == ["this document was not opened"]


async def run(folder: Path, answer: str) -> tuple[tl.Result, Json]:
    model = ScriptedModel([{"calls": [("open", {"id": "a.md"})]}, {"content": answer}])
    ends: list[Json] = []
    agent = tl.Agent(model, [tl.Search(folder)], trace=folder / "trace")
    result = await agent.run("What?")
    for event in tl.TraceReader.open(folder / "trace").events():
        if isinstance(event, tl.events.RunFinished):
            ends += event.citations
    return result, ends[0] if ends else {}


@pytest.mark.anyio
async def test_a_run_says_which_citations_hold(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Ada\nmayor: Bo\n")
    result, recorded = await run(tmp_path, "Bo [a.md:L2].")
    assert [citation.holds for citation in result.citations] == [True]
    assert recorded == {"text": "[a.md:L2]", "document": "a.md", "lines": [2, 2], "holds": True}


@pytest.mark.anyio
async def test_a_made_up_citation_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Ada\nmayor: Bo\n")
    result, recorded = await run(tmp_path, "Bo [a.md:L7].")
    assert [citation.problem for citation in result.citations] == ["line 7 was not shown"]
    assert recorded["problem"] == "line 7 was not shown"
