"""The same loop on a model that a server runs: `python remote_model.py URL MODEL FOLDER "TASK"`.

Any OpenAI-compatible server will do; the key comes from THINKLOOP_API_KEY or OPENAI_API_KEY.
"""

from __future__ import annotations

import sys

import thinkloop as tl


def main(url: str, model: str, folder: str, task: str) -> None:
    agent = tl.Agent(
        model=tl.RemoteModel(url, model), tools=[tl.Search(folder)], limits=tl.Limits(steps=300, seconds=3600)
    )
    result = agent.run_sync(task)
    print(result.answer or result.error)
    print(f"{result.reason}, {result.steps} steps, {result.usage.completion_tokens} tokens, trace in {result.trace}")


if __name__ == "__main__":
    main(*sys.argv[1:])
