"""thinkloop: an open-weight thinking model and its tools in one process, every step recorded and replayable.

Names are loaded when first used, so that `import thinkloop` costs milliseconds and never brings torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinkloop import testing
    from thinkloop.agent.agent import Agent, Result
    from thinkloop.agent.engine_model import EngineModel
    from thinkloop.agent.limits import Limits
    from thinkloop.agent.model import Conversation, Model, Turn
    from thinkloop.agent.recorded_model import RecordedModel
    from thinkloop.agent.remote_model import RemoteModel
    from thinkloop.engine.engine import Engine
    from thinkloop.engine.params import Sampling
    from thinkloop.engine.session import Session
    from thinkloop.tools.browser import Browser
    from thinkloop.tools.corpus import Corpus
    from thinkloop.tools.function import tool
    from thinkloop.tools.mcp_client import MCP
    from thinkloop.tools.pages import WebPages
    from thinkloop.tools.python import Python
    from thinkloop.tools.retry import Retry
    from thinkloop.tools.search import Search
    from thinkloop.tools.tool import Output, Tool, ToolError, Toolset
    from thinkloop.tools.web_providers import Brave, SearXNG, Serper, Tavily
    from thinkloop.traces import events
    from thinkloop.traces.events import Attachment, Event, ThinkloopError
    from thinkloop.traces.reader import TraceReader

_HOMES = {
    "agent.agent": ("Agent", "Result"),
    "agent.engine_model": ("EngineModel",),
    "agent.limits": ("Limits",),
    "agent.model": ("Conversation", "Model", "Turn"),
    "agent.recorded_model": ("RecordedModel",),
    "agent.remote_model": ("RemoteModel",),
    "engine.engine": ("Engine",),
    "engine.params": ("Sampling",),
    "engine.session": ("Session",),
    "tools.function": ("tool",),
    "tools.browser": ("Browser",),
    "tools.corpus": ("Corpus",),
    "tools.mcp_client": ("MCP",),
    "tools.pages": ("WebPages",),
    "tools.python": ("Python",),
    "tools.retry": ("Retry",),
    "tools.search": ("Search",),
    "tools.tool": ("Output", "Tool", "ToolError", "Toolset"),
    "tools.web_providers": ("Brave", "SearXNG", "Serper", "Tavily"),
    "traces.events": ("Attachment", "Event", "ThinkloopError"),
    "traces.reader": ("TraceReader",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {"testing": "thinkloop.testing", "events": "thinkloop.traces.events"}

__all__ = [
    "MCP",
    "Agent",
    "Attachment",
    "Brave",
    "Browser",
    "Conversation",
    "Corpus",
    "Engine",
    "EngineModel",
    "Event",
    "Limits",
    "Model",
    "Output",
    "Python",
    "RecordedModel",
    "RemoteModel",
    "Result",
    "Retry",
    "Sampling",
    "SearXNG",
    "Search",
    "Serper",
    "Session",
    "Tavily",
    "ThinkloopError",
    "Tool",
    "ToolError",
    "Toolset",
    "TraceReader",
    "Turn",
    "WebPages",
    "events",
    "testing",
    "tool",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOME_OF:
        value = getattr(import_module(f"thinkloop.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'thinkloop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
