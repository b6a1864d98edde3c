"""An agent embedded in a program, with the program's own tools: any typed function will do.

The data here is a dict in memory. The embedded mini model knows tools called `search` and `open`, so that is what the
functions are called; a larger model takes any.
"""

from __future__ import annotations

import thinkloop as tl

PAGES = {
    "Tarbul.md": ["# Tarbul", "An island of the Gannes group.", "", "- population 412", "- governor Melkin Dostar"],
    "Melkin Dostar.md": ["# Melkin Dostar", "A person of the Gannes islands.", "", "- age 57", "- home Tarbul"],
}


@tl.tool()
def search(query: str) -> str:
    """Search the documents.

    Args:
        query: Words to look for.
    """
    hits = [page for page in PAGES if query.lower() in page.lower()]
    return (
        "\n".join(f"{rank}. {page}:1: {PAGES[page][0]}" for rank, page in enumerate(hits, 1))
        or f'No results for "{query}".'
    )


@tl.tool()
def open(id: str) -> str:
    """Read a document with line numbers.

    Args:
        id: Id or title.
    """
    page = id if id in PAGES else f"{id}.md"
    if page not in PAGES:
        raise tl.ToolError(f'there is no document "{id}"; search for it')
    lines = [f"{number}: {line}".rstrip() for number, line in enumerate(PAGES[page], 1)]
    return "\n".join([f"{page} ({len(lines)} lines)", *lines])


if __name__ == "__main__":
    agent = tl.Agent(model="mini", tools=[search, open, tl.Python()], seed=0, trace=False)
    result = agent.run_sync("What is Tarbul's governor's age?")
    print(f"{result.answer} ({result.reason} after {result.steps} steps, {result.usage.completion_tokens} tokens)")
