"""A research task over a folder: `python research.py "What is …?" FOLDER`. Without arguments: the demo question.

Shows the events of a run as they come: what the model thinks, calls and reads, and the answer.
"""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import anyio

import thinkloop as tl


async def main(task: str, folder: Path) -> None:
    agent = tl.Agent(model="mini", tools=[tl.Search(folder), tl.Python()], limits=tl.Limits(steps=50), seed=0)
    async with agent, agent.stream(task) as events:
        async for event in events:
            match event:
                case tl.events.Thinking(text=text) | tl.events.Content(text=text):
                    print(text, end="", flush=True)
                case tl.events.ToolCall(name=name, raw=raw):
                    print(f"\n→ {name} {raw}")
                case tl.events.ToolResult(content=content):
                    print(f"← {content.splitlines()[0]}")
                case tl.events.RunFinished(answer=answer, sources=sources):
                    print(f"\nAnswer: {answer} (from {', '.join(sources)})")
                case _:
                    pass


if __name__ == "__main__":
    mini = files("thinkloop.engine") / "mini"
    question = sys.argv[1] if len(sys.argv) > 1 else (mini / "demo.txt").read_text(encoding="utf-8").strip()
    anyio.run(main, question, Path(sys.argv[2]) if len(sys.argv) > 2 else Path(str(mini / "world")))
