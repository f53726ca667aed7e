"""What the pages say of the code is true: names, files, sections, commands and options.

A link to code is written [`reward.py`](reward.py) `gap`: a file, and then names. Each name must be
defined in that file. There are no line numbers, so an inserted line breaks nothing.
"""

import ast
import re
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

CODE_LINK = re.compile(r"\[`([\w/]+\.py)`\]\(([\w./]+)\)((?:(?:,| and)? ?`\w+`)*)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
MEMBER = re.compile(r"(\w+)\.(\w+)")
FILE = re.compile(r"[\w./-]+\.(py|sh|md|png|txt|toml|yml)")
COMMAND = re.compile(r"python ((?:\w+/)*\w+\.py) ?([^`\n#|]*)")
TEST = re.compile(r"\btest_\w+\b(?!\.py)")
OF_A_RUN = re.compile(r"(curves|result|fig\d|stops)\.png|(samples|report)\.md")


@cache
def names_in(file):
    """Every function, class, method and constant that a Python file defines."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def wrong_names(text, folder):
    """What a page's links to code get wrong -> list of words; a link is relative to `folder`."""
    wrong = []
    for file, target, names in CODE_LINK.findall(text):
        path = ROOT / file
        if not path.exists() or (folder / target).resolve() != path.resolve():
            wrong.append(f"{file} links to {target}")
            continue
        for name in CODE.findall(names):
            if name not in names_in(path):
                wrong.append(f"{file} has no {name}")
    return wrong


def sections_of(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def test_links_to_code_name_what_the_file_defines(page):
    text = page.read_text(encoding="utf-8")
    assert wrong_names(text, page.parent) == []
    assert ".py#L" not in text, "link to the file, and name the function beside the link"


def test_a_renamed_function_is_noticed():
    right = "[`reward.py`](reward.py) `gaps`, `bradley_terry` and `CENTRE`; [`ppo.py`](ppo.py)"
    assert wrong_names(right, ROOT) == []
    assert wrong_names(right.replace("terry", "berry"), ROOT) == ["reward.py has no bradley_berry"]
    assert wrong_names("[`reward.py`](ppo.py) `gaps`", ROOT) == ["reward.py links to ppo.py"]
    assert wrong_names("[`gone.py`](gone.py)", ROOT) == ["gone.py links to gone.py"]


def test_every_file_and_section_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if ":" in target:  # an address on the web
            continue
        name, _, section = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not section or section in sections_of(file), target
    for name in CODE.findall(text):
        if FILE.fullmatch(name) and not OF_A_RUN.fullmatch(name):
            assert (ROOT / name).exists(), name


def test_members_of_modules_exist(page):
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        member = MEMBER.fullmatch(code)
        if member and (ROOT / f"{member[1]}.py").exists() and member[2] not in ("py", "md"):
            assert member[2] in names_in(ROOT / f"{member[1]}.py"), code


def test_tests_exist(page):
    tests = set()
    for file in (ROOT / "tests").glob("test_*.py"):
        tests |= names_in(file)
    for name in TEST.findall(page.read_text(encoding="utf-8")):
        assert name in tests


def test_imports_in_snippets_exist(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
                for alias in node.names:
                    assert alias.name in names_in(ROOT / f"{node.module}.py"), node.module


def test_commands_of_pit_parse(page):
    import typer

    import pit

    commands = typer.main.get_command(pit.app).commands
    text = page.read_text(encoding="utf-8")
    for script, words in COMMAND.findall(text):
        if script == "pit.py" and words:
            words = words.replace("[", "").replace("]", "").replace(" FILE", f" {page}")
            name, *words = shlex.split(words)
            words = [word for word in words if word != "--help"]
            commands[name].make_context(name, words)  # reads the words, runs nothing


def test_options_and_scripts_exist(page):
    import typer

    import pit

    commands = typer.main.get_command(pit.app).commands
    ours = {option for command in commands.values() for p in command.params for option in p.opts}
    text = page.read_text(encoding="utf-8")
    elsewhere = set()  # options of other scripts
    for script, words in COMMAND.findall(text):
        assert (ROOT / script).exists(), script
        if script != "pit.py":
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in re.findall(r"--[\w-]+", words):
                known = option in source or re.search(
                    rf"\b{option[2:].replace('-', '_')}\b", source
                )
                assert known, f"{script} {option}"
                elsewhere.add(option)
    for code in CODE.findall(text):
        if code.startswith("--"):
            assert code.split()[0] in ours | elsewhere | {"--help"}, code


def test_the_requirements_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def names(lines):
        return {re.match(r"[\w-]+", line)[0] for line in lines if line[:1] not in ("#", "-", "")}

    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pinned_dev = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert names(pinned) == names(project["project"]["dependencies"])
    assert names(pinned_dev) == names(project["dependency-groups"]["dev"])


def test_every_import_is_of_a_requirement():
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    scripts = list(ROOT.glob("*.py"))
    known = sys.stdlib_module_names | {script.stem for script in scripts}
    for script in scripts:
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module]
            for name in imported:
                package = name.split(".")[0]
                assert package in known or f"\n{package}==" in pinned, f"{script.name}: {name}"
