"""Calls are made again as their policy says, and the record says of each attempt what became of it."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import anyio
import pytest
from thinkloop.tools.call_record import recording
from thinkloop.tools.function import FunctionTool, tool
from thinkloop.tools.retry import NO_RETRY, Retry
from thinkloop.tools.signature import DefinitionError
from thinkloop.tools.tool import ToolError

pytestmark = pytest.mark.anyio


def failing(errors: list[BaseException | None], retry: Retry | int, **options: Any) -> tuple[FunctionTool, list[float]]:
    """A tool whose attempts fail with these errors, one after the other, and when each was made."""
    made: list[float] = []

    def f() -> str:
        made.append(time.monotonic())
        error = errors[len(made) - 1]
        if error is not None:
            raise error
        return f"after {len(made)}"

    return tool(name="f", retry=retry, **options)(f), made


QUICK = Retry(times=2, wait=0)


async def test_an_error_that_may_pass_is_tried_again_and_recorded() -> None:
    made, at = failing([TimeoutError("slow"), ConnectionResetError(), None], QUICK)
    with recording() as facts:
        assert (await made.call({})).content == "after 3"
    assert len(at) == 3
    assert [attempt["error"] for attempt in facts["attempts"]] == ["TimeoutError: slow", "ConnectionResetError", ""]
    assert all(attempt["seconds"] >= 0 for attempt in facts["attempts"])


async def test_attempts_are_bounded_and_the_last_error_is_told() -> None:
    made, at = failing([TimeoutError(str(n)) for n in range(5)], QUICK)
    with recording() as facts, pytest.raises(ToolError, match="TimeoutError: 2"):
        await made.call({})
    assert len(at) == len(facts["attempts"]) == 3


@pytest.mark.parametrize("error", [ValueError("no"), ToolError("no such city"), FileNotFoundError(), SystemExit(1)])
async def test_other_errors_are_not_tried_again(error: BaseException) -> None:
    made, at = failing([error, None], QUICK)
    with pytest.raises(ToolError):
        await made.call({})
    assert len(at) == 1


async def test_the_policy_says_which_errors_and_how_often() -> None:
    made, at = failing([ValueError(), ValueError(), ValueError(), None], Retry(times=3, wait=0, on=(ValueError,)))
    assert (await made.call({})).content == "after 4"
    made, at = failing([TimeoutError(), None], 1)
    assert (await made.call({})).content == "after 2"
    assert at[1] - at[0] >= 0.5


async def test_a_call_that_succeeds_at_once_leaves_no_attempts_in_the_record() -> None:
    made, _ = failing([None], QUICK)
    with recording() as facts:
        await made.call({})
    assert facts == {}


async def test_waits_double() -> None:
    made, at = failing([TimeoutError()] * 3 + [None], Retry(times=3, wait=0.05))
    await made.call({})
    waits = [later - earlier for earlier, later in pairwise(at)]
    assert all(wait >= least for wait, least in zip(waits, (0.05, 0.1, 0.2), strict=True))
    assert [Retry(wait=10).pause(n) for n in (1, 2, 3, 9)] == [10, 20, 40, 60]


async def test_a_wait_that_would_outlast_the_deadline_is_not_begun() -> None:
    made, at = failing([TimeoutError("mine")] * 3, Retry(times=2, wait=30))
    started = time.monotonic()
    with anyio.fail_after(5), pytest.raises(ToolError, match="TimeoutError: mine"):
        await made.call({})
    assert len(at) == 1
    assert time.monotonic() - started < 4


async def test_async_functions_are_tried_again_too() -> None:
    tries = 0

    @tool(retry=QUICK)
    async def f() -> int:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise TimeoutError
        return tries

    assert (await f.call({})).content == "3"


def test_what_writes_is_not_done_twice_unless_that_is_harmless() -> None:
    def save(text: str) -> None: ...

    with pytest.raises(DefinitionError, match=r"`save` writes.*idempotent=True"):
        tool(effect="write", retry=2)(save)
    assert tool(effect="write", retry=2, idempotent=True)(save).retry == Retry(times=2)
    assert tool(effect="write")(save).retry == NO_RETRY


@pytest.mark.parametrize(
    "options",
    [
        {"times": -1}, {"times": 11}, {"times": 1.5}, {"times": True}, {"wait": -1}, {"wait": 61}, {"on": ()},
        {"on": TimeoutError}, {"on": (BaseException,)}, {"on": ("TimeoutError",)},
    ],
)  # fmt: skip
def test_policies_that_make_no_sense_are_refused(options: Any) -> None:
    with pytest.raises(DefinitionError, match="give"):
        Retry(**options)
