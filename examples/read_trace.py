"""Reading a trace: `python read_trace.py TRACE` prints where a run's tokens and time went, step by step."""

from __future__ import annotations

import sys

import thinkloop as tl


def main(folder: str) -> None:
    step, calls, usage = 0, [], None
    for event in tl.TraceReader.open(folder).events():
        match event:
            case tl.events.StepStarted(step=step):
                calls, usage = [], None
            case tl.events.ToolCall(name=name):
                calls.append(name)
            case tl.events.Usage():
                usage = event
            case tl.events.StepFinished(seconds=seconds):
                spent = (
                    f"{usage.completion_tokens:5} tokens, {usage.thinking_tokens:5} of them thinking" if usage else ""
                )
                print(f"step {step:3}  {seconds:6.2f} s  {spent}  {' '.join(calls) or 'answer'}")
            case tl.events.RunFinished(answer=answer, reason=reason):
                print(f"{reason}: {answer}")
            case _:
                pass


if __name__ == "__main__":
    main(sys.argv[1])
