"""The Chinese README says what the English one says: headings, commands, links, figures. And its glossary names words that are in use."""

import re

from source import ROOT, read
from test_readme import README, listed

CHINESE, SEPARATOR = read(ROOT / "README_zh.md"), "\n## 术语表\n"
TRANSLATED, GLOSSARY = CHINESE.split(SEPARATOR)


def headings(text: str) -> list[int]:
    """The level of each heading outside code."""
    return [len(marks) for marks in re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)]


def code(text: str) -> list[tuple[str, list[str]]]:
    """Each block: its language, and its lines without comments; of a drawn tree the paths."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(language, list(listed(block)) if block.startswith("nanovlm/") else [re.sub(r"\s+# .*", "", line) for line in block.split("\n")])
            for language, block in blocks]


def rows(text: str) -> list[list[str]]:
    """The numbers of every row of a table, in order."""
    return [re.findall(r"\d+(?:[.,]\d+)*", line) for line in text.split("\n") if line.startswith("|")]


def numbers(text: str) -> list[set[str]]:
    """The numbers of each section, code and comments included."""
    return [set(re.findall(r"\d+(?:[.,]\d+)*", section)) for section in re.split(r"^#+ ", text, flags=re.MULTILINE)]


def links(text: str) -> list[str]:
    return sorted(link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("README", "#")))


def test_both_readmes_have_the_same_headings():
    assert headings(TRANSLATED) == headings(README) and len(headings(README)) > 8


def test_both_readmes_have_the_same_code():
    assert code(TRANSLATED) == code(README) and len(code(README)) > 8


def test_both_readmes_have_the_same_figures():
    assert rows(TRANSLATED) == rows(README) and len(rows(README)) > 20
    for english, chinese in zip(numbers(README), numbers(TRANSLATED), strict=True):
        assert english == chinese, f"in one of them only: {english ^ chinese}"


def test_both_readmes_lead_to_the_same_places_and_to_each_other():
    assert links(TRANSLATED) == links(README)
    assert "](README_zh.md)" in README.split("\n## ")[0] and "](README.md)" in CHINESE.split("\n## ")[0]


def test_a_translation_that_lacks_something_is_found():
    assert code("```bash\na b  # one\n```\n") == code("```bash\na b  # 一\n```\n") != code("```bash\na c  # one\n```\n")
    assert rows("| a | 0.5 |\n| b | 2 |") == [["0.5"], ["2"]] != rows("| a | 2 |\n| b | 0.5 |")
    assert headings("# a\n```bash\n# b\n```\n## c\n") == [1, 2]


def test_the_glossary_has_words_of_this_repository_once_each():
    lines = [line for line in GLOSSARY.split("\n") if line.startswith("| ")][1:]  # without the head
    terms = [re.fullmatch(r"\| (.+) \| (.+) \| `(.+)` \|", line).groups() for line in lines]
    assert 60 <= len(terms) <= 100
    for column in (0, 1):
        words = [term[column] for term in terms]
        assert not (twice := {word for word in words if words.count(word) > 1}), f"twice in the glossary: {twice}"
    for english, _, file in terms:
        text = re.sub(r"\s+", " ", read(ROOT / file)).lower()
        assert re.search(rf"\b{re.escape(english)}", text), f"{english} is not in {file}"
