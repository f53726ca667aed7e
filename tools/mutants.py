r"""Which mistakes in RLHF are silent, and which test notices? 317 of them, one line each.

Nearly all of these run to the end, print falling losses, and train something worse. Each is made in
a temporary copy of the project, where the test that should notice it must fail; if it does not,
all tests of that module and the golden run have their turn. What no test notices is printed.

Run: python tools/mutants.py                all, about twenty-five minutes
     python tools/mutants.py ppo.py EOS     those whose file, line or meaning has one of these words

How to read the list, mutants.txt:

    == the file
    # what the mistake means
    - the line as it is, which must be there exactly once; after "@ name", once in that function
    + the line as broken
    = the test that notices, or "= nobody:" and why that is all right
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_name("mutants.txt")
PATIENCE = 600  # seconds: a mistake may also loop for ever
# pytest without what takes longer than a test: rewritten assertions, a last collection of garbage
QUICK = "--assert=plain -p no:cacheprovider -p no:unraisableexception -p no:threadexception".split()


@dataclass
class Mutant:
    file: str
    means: str
    line: str
    broken: str
    test: str
    within: str = ""  # the function that the line is in, where that has to be said

    @property
    def excused(self):
        return self.test.startswith("nobody:")


def read_list(text):
    """The mutants of the list, checked to have all their parts."""
    mutants, file, parts = [], "", {}
    names = {"#": "means", "@": "within", "-": "line", "+": "broken", "=": "test"}
    for number, row in enumerate(text.splitlines(), 1):
        sign, _, rest = row.strip().partition(" ")
        if sign == "==":
            file = rest
        elif sign in names and file:
            parts[names[sign]] = rest.strip()
        elif sign and file:
            sys.exit(f"mutants.txt, line {number}: begins with none of == # @ - + =")
        if sign == "=":
            mutants.append(Mutant(file, **parts))
            parts = {}
    return mutants


def mutate(mutant, text):
    """The text of a file with one line broken, which has to be there exactly once."""
    lines = text.split("\n")
    first, last = 0, len(lines)
    if mutant.within:
        starts = [i for i, line in enumerate(lines) if line.strip().startswith(mutant.within)]
        first = starts[0] if len(starts) == 1 else last
    found = [i for i in range(first, last) if lines[i].strip() == mutant.line]
    if mutant.within:
        found = found[:1]
    if len(found) != 1:
        sys.exit(f"{mutant.file} has this line {len(found)} times, not once: {mutant.line}")
    indent = lines[found[0]][: -len(lines[found[0]].lstrip())]
    lines[found[0]] = indent + mutant.broken
    return "\n".join(lines)


# ---- running tests in a copy -------------------------------------------------------------------


def load_libraries():
    """Import what the project imports, which takes longer than most tests, and forget itself."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = True  # a stale .pyc of a line would hide the next one
    sys.path.insert(0, str(ROOT))
    for name in ("models", "ppo", "evaluate", "pit", "pytest"):
        __import__(name)
    # some libraries are imported when they are first used
    sys.modules["models"].load_model("tiny").generate("blank", [[5, 6]], 1)
    for name, module in list(sys.modules.items()):
        ours = Path(getattr(module, "__file__", None) or "/").is_relative_to(ROOT)
        if ours and name != "__main__":  # click reads the name of the program from it
            del sys.modules[name]
    sys.path.remove(str(ROOT))


def failed_tests(copy, tests):
    """Run tests in the folder `copy` up to the first failure -> names of those that failed.

    In a forked process, which has the libraries already, and imports the project from `copy`.
    """
    told = copy / "failed.json"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        run_tests(copy, tests, told)
    started = time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - started > PATIENCE:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return ["(it never ends)"]
        time.sleep(0.05)
    return json.loads(told.read_text()) if told.exists() else ["(the process died)"]


def run_tests(copy, tests, told):
    """The child's part: write which tests failed, and exit."""
    import pytest

    class Listener:
        names = []

        def pytest_runtest_logreport(self, report):
            if report.failed:
                self.names.append(report.nodeid.partition("::")[2])

    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    paths = [f"tests/{test}" for test in tests]
    code = pytest.main(["-x", f"--rootdir={copy}", *QUICK, *paths], plugins=[Listener()])
    names = Listener.names
    if not names and code != 0:
        names = ["(nothing could be imported)"] if code < 4 else [f"(no such test: {tests})"]
    told.write_text(json.dumps(names))
    os._exit(0)


def main():
    words = sys.argv[1:]
    mutants = []
    for mutant in read_list(LIST.read_text(encoding="utf-8")):
        about = f"{mutant.file} {mutant.line} {mutant.means}"
        mutate(mutant, (ROOT / mutant.file).read_text(encoding="utf-8"))
        if not words or any(word in about for word in words):
            mutants.append(mutant)
    if not mutants:
        sys.exit("No mistake of the list has one of these words.")

    load_libraries()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        leave = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.old")
        shutil.copytree(ROOT, copy, ignore=leave)
        survivors = try_all(mutants, copy)
    print(f"\n{len(mutants)} mistakes, {len(survivors)} of them noticed by no test.")
    for mutant in survivors:
        print(f"  {mutant.file}: {mutant.means}\n    {mutant.line}\n    {mutant.broken}")


def try_all(mutants, copy):
    """Make each mistake in `copy` -> those that no test notices. Excused ones are left out."""
    # the tests must pass where nothing is broken, or all mistakes would seem to be noticed
    tests = sorted({mutant.test for mutant in mutants if not mutant.excused})
    if failed := failed_tests(copy, tests):
        sys.exit(f"Without any mistake, a test fails: {failed[0]}")
    survivors = []
    for mutant in mutants:
        started = time.monotonic()
        noticed = [mutant.test] if mutant.excused else tests_that_notice(mutant, copy)
        if not noticed:
            survivors.append(mutant)
        by = noticed[0] if noticed else "NOBODY"
        seconds = time.monotonic() - started
        print(f"{mutant.file:14} {mutant.means:66} {seconds:4.0f} s  {by}", flush=True)
    return survivors


def tests_that_notice(mutant, copy):
    """Break the line in `copy` for as long as the tests run -> names of the tests that failed."""
    path = copy / mutant.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(mutate(mutant, whole), encoding="utf-8")
    noticed = failed_tests(copy, [mutant.test])
    if not noticed:
        # all tests of the module, and the golden run, which sees all of training
        noticed = failed_tests(copy, [f"test_{mutant.file}", "test_golden.py"])
    path.write_text(whole, encoding="utf-8")
    return noticed


if __name__ == "__main__":
    main()
