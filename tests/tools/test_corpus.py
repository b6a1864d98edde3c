"""Search over a folder: stable ids, numbered lines, pages, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from thinkloop.tools.corpus import Corpus, CorpusError, Search, format_hits, format_page
from thinkloop.tools.tool import ToolError

LONG = "\n".join(f"row {number} {'needle' if number in (150, 390) else 'hay'}" for number in range(1, 401))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "install.md").write_text("# Installing\n\nRun the installer.\nThen restart the harbour.\n")
    (tmp_path / "harbour.md").write_text("# Harbour\n\nShips land here.\n")
    (tmp_path / "long.txt").write_text(LONG)
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_ids_are_paths_and_titles_win(folder: Path) -> None:
    hits = Corpus(folder).search("harbour")
    assert [(hit.id, hit.line) for hit in hits] == [("harbour.md", 1), ("guide/install.md", 4)]
    assert format_hits("harbour", hits) == (
        "1. harbour.md:1: # Harbour\n2. guide/install.md:4: Then restart the harbour."
    )


def test_all_words_first_then_any(folder: Path) -> None:
    corpus = Corpus(folder)
    assert [hit.id for hit in corpus.search("restart harbour")] == ["guide/install.md"]
    assert {hit.id for hit in corpus.search("installer ships")} == {"guide/install.md", "harbour.md"}
    assert format_hits("zebra", corpus.search("zebra")) == 'No results for "zebra".'


@pytest.mark.parametrize(
    "query", ["", "   ", '"', "a AND", "NEAR(", "x*", "title:", "'; DROP TABLE documents; --", "\x00", "🚢"]
)
def test_no_query_is_an_error(folder: Path, query: str) -> None:
    corpus = Corpus(folder)
    corpus.search(query)
    assert len(corpus) == 3


def test_a_document_is_found_by_id_or_title(folder: Path) -> None:
    corpus = Corpus(folder)
    by_id, by_title = corpus.document("guide/install.md"), corpus.document("Installing")
    assert by_id is not None
    assert by_id == by_title
    assert corpus.document("../../etc/passwd") is None


def test_lines_are_numbered_and_long_documents_come_in_pages(folder: Path) -> None:
    document = Corpus(folder).document("long.txt")
    assert document is not None
    first = format_page(document, max_chars=300).split("\n")
    more = int(first[0].split("line ")[1].split(" ")[0])
    assert first[0].startswith("long.txt (400 lines; more from line")
    assert first[1] == "1: row 1 hay"
    assert first[-1] == f"{more - 1}: row {more - 1} hay"
    second = format_page(document, line=more, max_chars=300).split("\n")
    assert second[1].startswith(f"{more}: ")


def test_find_shows_only_lines_with_the_text(folder: Path) -> None:
    document = Corpus(folder).document("long.txt")
    assert document is not None
    assert format_page(document, find="NEEDLE").split("\n")[1:] == ["150: row 150 needle", "390: row 390 needle"]
    assert format_page(document, line=200, find="needle").split("\n")[1:] == ["390: row 390 needle"]
    with pytest.raises(ToolError, match='has "zebra"'):
        format_page(document, find="zebra")
    with pytest.raises(ToolError, match="lines 1 to 400"):
        format_page(document, line=401)


def test_a_folder_without_text_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no readable text"):
        Corpus(tmp_path)
    with pytest.raises(CorpusError, match="does not exist"):
        Corpus(tmp_path / "nowhere")
    (tmp_path / "file.md").write_text("x")
    with pytest.raises(CorpusError, match="does not exist"):
        Corpus(tmp_path / "file.md")


def test_bytes_that_are_not_text_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 \xff\xfe latin")
    (tmp_path / "good.md").write_text("# Good")
    assert [hit.id for hit in Corpus(tmp_path).search("latin")] == ["bad.txt"]


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.md"
    secret.write_text("# Secret\npassword")
    (folder / "link.md").symlink_to(secret)
    assert Corpus(folder).search("password") == []
    assert Corpus(folder).document("link.md") is None


@pytest.mark.anyio
async def test_the_tools_record_what_was_opened(folder: Path) -> None:
    async with Search(folder) as search:
        find, read = search.tools()
        found = await find.call({"query": "harbour", "limit": 1})
        assert found.content == "1. harbour.md:1: # Harbour"
        page = await read.call({"id": "harbour.md"})
        assert page.record["document"] == "harbour.md"
        assert page.content == "harbour.md (3 lines)\n1: # Harbour\n2:\n3: Ships land here."
        with pytest.raises(ToolError, match='there is no document "Port"; search for it'):
            await read.call({"id": "Port"})
