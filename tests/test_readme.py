"""What README.md and docs/tutorial.md say of the code is true: lines, files, commands and options.

A link to a line is written [`reward.py:16`](reward.py#L16) `bradley_terry`: the name is that of a function or a class, or any
text that only one line of the file holds, and the number must be that line's. After an edit of the code has moved the lines,
`python tests/test_readme.py` writes the new numbers into the pages.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md"]

LINE_LINK = re.compile(r"\[`([\w/]+\.py):\d+`\]\(([\w./]+)#L\d+\)( ?)`([^`]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"python pit\.py ([a-z]+[^`\n#]*)")


def line_of(name, file):
    """The number of the line where `name` is defined, or of the only line that holds it as text."""
    lines = file.read_text(encoding="utf-8").splitlines()
    plain = re.escape(name)
    for pattern in (rf"\s*(def|class) {plain}\b", rf"{plain}\b.* = ", rf".*{plain}"):
        found = [number for number, line in enumerate(lines, 1) if re.match(pattern, line)]
        if found:
            break
    if len(found) != 1:
        raise LookupError(
            f"`{name}` stands on {len(found)} lines of {file.name}: a link needs exactly one. {found}"
        )
    return found[0]


def with_lines(page):
    """The text of a page with the right number in each link to a line."""

    def right(link):
        file, target, space, name = link.groups()
        assert (page.parent / target).resolve() == ROOT / file, (
            f"{page.name}: `{file}` links to {target}"
        )
        number = line_of(name, ROOT / file)
        return f"[`{file}:{number}`]({target}#L{number}){space}`{name}`"

    return LINE_LINK.sub(right, page.read_text(encoding="utf-8"))


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def test_links_name_the_line_where_the_code_is(page):
    for said, true in zip(
        page.read_text(encoding="utf-8").splitlines(), with_lines(page).splitlines()
    ):
        assert said == true, "lines have moved: run `python tests/test_readme.py`"


def test_every_link_to_a_line_has_the_form_that_is_checked(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("#L") == len(LINE_LINK.findall(text)) > 0


def test_a_moved_line_is_noticed_and_mended(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "code.py").write_text("X = 1\n\n\ndef f():\n    return X + 1\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[`code.py:9`](code.py#L9) `f`, [`code.py:9`](code.py#L9) `X`, [`code.py:9`](code.py#L9) `X + 1`"
    )
    assert (
        with_lines(page)
        == "[`code.py:4`](code.py#L4) `f`, [`code.py:1`](code.py#L1) `X`, [`code.py:5`](code.py#L5) `X + 1`"
    )
    for name in ("nowhere", "1"):  # on no line, on two
        with pytest.raises(LookupError, match=name):
            line_of(name, tmp_path / "code.py")


def test_every_file_that_is_named_exists(page):
    from run import FILES

    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        assert ":" in target or (page.parent / target).exists(), target
    for name in CODE.findall(text):
        if re.fullmatch(r"[\w./-]+\.(py|md|png|json|jsonl|toml|txt)", name):
            assert (ROOT / name).exists() or name in FILES.split(), (
                name
            )  # FILES: what a run leaves in its folder


def test_every_command_parses_and_every_option_exists(page):
    import typer

    import pit

    commands = typer.main.get_command(pit.app).commands
    text = page.read_text(encoding="utf-8")
    found = COMMAND.findall(text)
    assert found
    for line in found:
        name, *words = shlex.split(line.replace("[", "").replace("]", ""))
        commands[name].make_context(
            name, [word for word in words if word != "--help"]
        )  # reads the words, runs nothing
    options = {option for command in commands.values() for p in command.params for option in p.opts}
    for code in CODE.findall(text):
        if code.startswith("--"):
            assert code.split()[0] in options | {"--help"}, code


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_lines(page), encoding="utf-8")
