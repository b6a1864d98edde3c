"""Scripts that read a page. They run in a world of their own, where the page's scripts have replaced nothing that they call,
and what they give back is bounded inside the page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from thinkloop.tools.extract_text import clean_line

if TYPE_CHECKING:
    from playwright.async_api import CDPSession, Locator

_TITLE = 1000  # characters
# Elements may be named like what is read of a document or a form; the prototypes' getters don't mind
_GET = "const get = (type, name, it) => Object.getOwnPropertyDescriptor(type.prototype, name).get.call(it);"
_MEASURE = """(maxTitle, maxElements, maxCharacters) => {
  const unseen = /^(src|srcset|imagesrcset|srcdoc|style|class|d|points|content|poster|integrity|nonce|data-.*|on.*)$/;
  const roots = [document], all = Document.prototype.getElementsByTagName.call(document, '*').length;
  let elements = 0, size = 0;
  while (roots.length) {
    const walk = Document.prototype.createTreeWalker.call(document, roots.pop(), 5);
    while (size < maxCharacters && elements <= maxElements && walk.nextNode()) {
      const node = walk.currentNode;
      if (get(Node, 'nodeType', node) === 3) { size += node.data.length; continue; }
      elements++;
      for (const each of get(Element, 'attributes', node)) if (!unseen.test(each.name)) size += each.value.length;
      if (typeof node.value === 'string') size += node.value.length;
      if (get(Element, 'shadowRoot', node)) roots.push(get(Element, 'shadowRoot', node));
      if (['IFRAME', 'FRAME'].includes(node.nodeName) && node.contentDocument) roots.push(node.contentDocument);
    }
  }
  return [get(Document, 'title', document).slice(0, maxTitle), Math.max(elements, all), size];
}"""
_HTML = "max => get(Document, 'documentElement', document).outerHTML.slice(0, max)"
_TEXT = """(max, seconds) => {
  const until = performance.now() + seconds * 1000, skip = new Set(['SCRIPT', 'STYLE', 'NOSCRIPT', 'TEMPLATE', 'HEAD']);
  const inline = new Set(['A', 'B', 'I', 'EM', 'STRONG', 'CODE', 'SPAN', 'SMALL', 'SUB', 'SUP', 'MARK', 'TIME', 'LABEL']);
  const pick = node => node.nodeType === 1 && skip.has(node.nodeName) ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT;
  const root = get(Document, 'body', document) || get(Document, 'documentElement', document), parts = [];
  const walk = Document.prototype.createTreeWalker.call(document, root, 5, pick);
  let size = 0;
  while (walk.nextNode() && size < max) {
    const node = walk.currentNode;
    if (node.nodeType === 3) parts.push(node.data.slice(0, max));
    else if (!inline.has(node.nodeName)) parts.push('\\n');
    else if (node.nodeName === 'A' && node.href) parts.push(` <${String(node.href).slice(0, 200)}> `);
    else continue;
    size += parts[parts.length - 1].length;
    if (parts.length % 1000 === 0 && performance.now() > until) break;
  }
  return parts.join('').slice(0, max);
}"""
_BOTTOM = "() => scrollTo(0, get(Document, 'documentElement', document).scrollHeight)"

_OPTIONS = """e => {
  const options = e.options ? [...e.options].slice(0, 5000) : [], cut = text => String(text).trim().slice(0, 500);
  return [options.map(o => cut(o.label)), options.map(o => cut(o.value))];
}"""


class Measure(NamedTuple):
    """How much a snapshot of the page would hold, frames of other origins left out; counting stops above the bounds."""

    title: str
    elements: int
    characters: int


class Scripts:
    """The scripts on one page, `frame` by the protocol's id. A failure is playwright's `Error`."""

    def __init__(self, cdp: CDPSession, frame: str) -> None:
        self._cdp, self._frame = cdp, frame

    async def measure(self, max_elements: int, max_characters: int) -> Measure:
        title, elements, characters = await self._run(_MEASURE, _TITLE, max_elements, max_characters)
        return Measure(clean_line(str(title), 200), int(elements), int(characters))

    async def html(self, max_characters: int) -> str:
        return str(await self._run(_HTML, max_characters))

    async def text(self, max_characters: int, seconds: float) -> str:
        """The page's text with its links' addresses in <>, as far as it is read within `seconds`."""
        return str(await self._run(_TEXT, max_characters, seconds))

    async def scroll_to_end(self) -> None:
        await self._run(_BOTTOM)

    async def _run(self, function: str, *arguments: float) -> Any:
        from playwright.async_api import Error

        world = await self._cdp.send("Page.createIsolatedWorld", {"frameId": self._frame, "worldName": "thinkloop"})
        call = f"(() => {{ {_GET} return ({function})(...{json.dumps(arguments)}) }})()"
        options = {"expression": call, "contextId": world["executionContextId"], "returnByValue": True}
        answer = await self._cdp.send("Runtime.evaluate", options)
        if details := answer.get("exceptionDetails"):
            raise Error(f"the page could not be read: {clean_line(str(details.get('text')), 100)}")
        return answer["result"].get("value")


async def options_of(element: Locator) -> tuple[list[str], list[str]]:
    """Labels and values of a select field; none of another element. This alone runs beside the page's scripts, which may
    have it give back anything."""
    match await element.evaluate(_OPTIONS):
        case [list() as labels, list() as values]:
            return [str(label) for label in labels], [str(value) for value in values]
        case _:
            return [], []
