"""The battery's table: each row says what held, once, and all rows are shown at the end.

pytest tests/attacks -v                        the table in the terminal
pytest tests/attacks --attacks-table FILE      the table as Markdown
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path

import pytest
from thinkloop.tools.python import Python

sys.path.insert(0, str(Path(__file__).parents[1]))  # web_site, search_server
from cell import CALL, run
from leftovers import Left

BEFORE = Left.now()
_HELD = pytest.StashKey[list[str]]()
_ROWS = pytest.StashKey[list[tuple[str, str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attacks-table", metavar="FILE", help="write `attack | what held` as Markdown")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The row that looks for leftovers comes after all others of the battery."""
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    ordered = iter(sorted(here, key=lambda item: item.path.stem == "test_leftovers"))
    items[:] = [next(ordered) if item in here else item for item in items]


@pytest.fixture(scope="session")
def before() -> Left:
    """What there was before the first row."""
    return BEFORE


@pytest.fixture(scope="session")
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One of the battery's own, so that what a row leaves in it can be told from others'."""
    tmp_path_factory.getbasetemp()  # stays where it is
    with tempfile.TemporaryDirectory(prefix="attacks-", dir="/tmp") as name:
        Path(name).chmod(0o711)  # the browser runs as another user
        yield Path(name)


@pytest.fixture(scope="module", autouse=True)
def in_temporary_folder(temporary_folder: Path) -> Iterator[None]:
    """The rows use it, and tests after them don't."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary_folder))
        patch.setenv("TMPDIR", str(temporary_folder))
        yield


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Called once by every row, with the layer that held and the evidence of it."""
    said = request.node.stash.setdefault(_HELD, [])

    def note(layer: str) -> None:
        said.append(" ".join(layer.split()))

    return note


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def python() -> AsyncIterator[Python]:
    async with Python(timeout=10, memory_mb=256) as toolset:
        await run(toolset, CALL)
        yield toolset


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    yield
    said = item.stash.get(_HELD, [])
    if len(said) != 1 or not said[0]:
        pytest.fail(f"a row says once what held; this one said it {len(said)} times", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    rows = item.config.stash.setdefault(_ROWS, [])
    if report.when == "call" and report.passed:
        rows.append((item.path.stem, _attack(item), item.stash.get(_HELD, [""])[0]))
    elif report.when == "call" and hasattr(report, "wasxfail"):
        rows.append((item.path.stem, _attack(item), f"NOTHING HELD YET: {report.wasxfail.removeprefix('reason: ')}"))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_ROWS, [])
    path = config.getoption("attacks_table", None)
    if rows and path:
        Path(path).write_text(_markdown(rows))
    if rows and config.get_verbosity() >= 0:
        terminalreporter.section("attack | what held")
        for _, attack, layer in rows:
            terminalreporter.write_line(f"{attack} | {layer}")
    if rows and (path or config.get_verbosity() >= 0):
        terminalreporter.write_line(f"{len(rows)} attacks")


def _attack(item: pytest.Item) -> str:
    name, _, case = item.name.partition("[")
    words = name.removeprefix("test_").replace("_", " ")
    return f"{words}: {case.removesuffix(']')}" if case else words


def _markdown(rows: list[tuple[str, str, str]]) -> str:
    lines = [f"# {len(rows)} attacks, and what held", ""]
    part = ""
    for module, attack, layer in rows:
        if module != part:
            part = module
            title = module.removeprefix("test_").replace("_", " ").capitalize()
            lines += [f"## {title}", "", "| attack | what held |", "|---|---|"]
        lines.append(f"| {_cell(attack)} | {_cell(layer)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_`\\])", r"\\\1", text)
