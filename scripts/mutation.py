"""Plant small bugs in a module, one at a time, and see whether its tests notice.

    pip install -e ".[mutation]"
    python scripts/mutation.py lora_vit/data/splits.py [--tests tests/unit/data] [--sample 150] [--lines 30-60]

The bugs ("mutants") are mutmut's operators, applied by libcst to everything in the file: decorated functions, class
bodies and constants too; a few are added below. A mutant runs in a process that is forked after the heavy packages are
imported; an import hook gives it the changed source, so that no file is touched. It runs only the tests that reach the
changed lines (coverage says which), in that process: commands that tests start use the package as it is.
docs/testing.md says how to read the result.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import importlib
import importlib.util
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # each mutant would load them again; no test needs one
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not survive a fork

import coverage
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation import mutators

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "pandas", "scipy.stats", "sklearn", "matplotlib.pyplot", "hydra", "safetensors.torch")
QUICK = "not slow and not gpu and not distributed"
SKIPPED = (cst.Annotation, cst.Import, cst.ImportFrom, cst.Assert)
"""Not mutated below these: types and guards that hold by construction."""


def extra_operators(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """What mutmut's operators leave out: a condition turned round, a statement or decorator gone, nothing returned."""
    if isinstance(node, cst.If | cst.While | cst.CompIf) and not isinstance(
        node.test, cst.Comparison | cst.UnaryOperation
    ):
        test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))
    gone = (cst.Raise, cst.AugAssign, cst.Del)
    if isinstance(node, gone) or (isinstance(node, cst.Expr) and isinstance(node.value, cst.Call)):
        yield cst.Pass()
    if isinstance(node, cst.Assign) and not isinstance(node.targets[0].target, cst.Name):
        yield cst.Pass()
    if isinstance(node, cst.Return) and node.value is not None and not node.value.deep_equals(cst.Name("None")):
        yield node.with_changes(value=cst.Name("None"), whitespace_after_return=cst.SimpleWhitespace(" "))
    if isinstance(node, cst.FunctionDef | cst.ClassDef):
        for i in range(len(node.decorators)):
            yield node.with_changes(decorators=[*node.decorators[:i], *node.decorators[i + 1 :]])


def changes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """All replacements of a node."""
    if isinstance(node, cst.SimpleString):  # a key or a name; prose and upper or lower case are left alone
        if not any(c.isspace() for c in node.raw_value):
            yield from itertools.islice(mutators.operator_string(node), 1)
        return
    for kind, operator in mutators.mutation_operators:
        if isinstance(node, kind):
            yield from operator(node)
    yield from extra_operators(node)


@dataclass(frozen=True)
class Mutant:
    """One change of a module; ``lines`` are those that it touches, from its statement's first."""

    number: int
    node: cst.CSTNode
    replacement: cst.CSTNode
    lines: range


def find_mutants(wrapper: MetadataWrapper) -> list[Mutant]:
    """Every mutant of a module, in the order of the source."""
    parents, positions = wrapper.resolve(ParentNodeProvider), wrapper.resolve(PositionProvider)
    found: list[Mutant] = []

    def visit(node: cst.CSTNode, statement: int) -> None:
        if isinstance(node, SKIPPED) or (isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)):
            return
        if isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict":
            return  # zip's own guard
        if isinstance(node, cst.SimpleString) and isinstance(parents[node], cst.ConcatenatedString):
            return
        place = positions[node]
        if isinstance(node, cst.BaseSmallStatement | cst.BaseCompoundStatement):
            statement = place.start.line
        statement = min(statement, place.start.line)  # a decorator stands above its statement
        end = place.start.line if isinstance(node, cst.BaseCompoundStatement) else place.end.line
        for replacement in changes(node):
            found.append(Mutant(len(found), node, replacement, range(statement, end + 1)))
        for child in node.children:
            visit(child, statement)

    visit(wrapper.module, 1)
    return found


class Hook(SourceFileLoader):
    """Meta path finder and loader in one: the module ``name`` is the given source."""

    def __init__(self, name: str, path: Path, source: str):
        super().__init__(name, str(path))
        self.source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec")


class Watch:
    """pytest plugin: runs the tests in ``only``, in its order (all, if None), and knows what is running."""

    def __init__(self, only: list[str] | None = None, enter: Callable[[str], None] = lambda name: None):
        self.only, self.enter = only, enter
        self.seconds: dict[str, float] = {}
        self.users: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.only is not None:
            rank = {name: i for i, name in enumerate(self.only)}
            items[:] = sorted((i for i in items if i.nodeid in rank), key=lambda i: rank[i.nodeid])
        for item in items:
            for fixture in item.fixturenames:  # type: ignore[attr-defined]
                self.users.setdefault(f"fixture {fixture}", []).append(item.nodeid)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        start = time.perf_counter()
        self.enter(item.nodeid)
        yield
        self.enter("")
        self.seconds[item.nodeid] = time.perf_counter() - start

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        shared = fixturedef.scope != "function"  # what it runs counts for every test that uses it
        if shared:
            self.enter(f"fixture {fixturedef.argname}")
        yield
        if shared:
            self.enter(request._pyfuncitem.nodeid)


def run_pytest(tests: list[str], marks: str, plugin: Watch) -> int:
    """pytest in this process; its folders are the working directory's."""
    options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=", "--basetemp=pytest"]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    where = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    return int(pytest.main([*options, *where, "-m", marks, *tests], plugins=[plugin]))


def in_child(work: Callable[[], int], seconds: float, output: Path | None = None) -> int | None:
    """Run ``work`` in a fork, in a folder of its own; its exit code, None if it ran over ``seconds`` of CPU time."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setsid()
                os.chdir(scratch)
                os.environ["TMPDIR"] = tempfile.tempdir = scratch
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
                resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
                sink = os.open(output or os.devnull, os.O_RDWR | os.O_CREAT)
                for stream in (0, 1, 2):
                    os.dup2(sink, stream)
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        deadline, status = time.monotonic() + 5 * seconds, None  # the clock, for a mutant that waits for ever
        while status is None and time.monotonic() < deadline:
            done, raw = os.waitpid(child, os.WNOHANG)
            status = raw if done else time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also what the tests have started
        if status is None:
            os.waitpid(child, 0)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        return None if code in (-signal.SIGXCPU, -signal.SIGKILL) else code


@dataclass
class Baseline:
    """The unchanged package's tests: seconds of each, users of each shared fixture, and what runs each file's lines
    (a test, a shared fixture, "" for the import).
    """

    seconds: dict[str, float]
    users: dict[str, list[str]]
    reach: dict[str, dict[str, list[str]]]

    def of(self, path: Path, lines: range) -> list[str]:
        """The tests that run any of the lines (all, for those that run at import): by file, the quickest first."""
        found = {name for line in lines for name in self.reach[str(path)].get(str(line), ())}
        names = set(self.seconds) if "" in found else {n for f in found for n in self.users.get(f, [f])}
        files: dict[str, float] = {}
        for name in names:
            file = name.split("::")[0]
            files[file] = files.get(file, 0) + self.seconds[name]
        return sorted(names, key=lambda n: (files[n.split("::")[0]], self.seconds[n]))


def measure(paths: list[Path], tests: list[str], marks: str, scratch: Path) -> Baseline:
    """Run the tests once on the unchanged package, under coverage."""
    result, output = scratch / "baseline.json", scratch / "baseline.txt"

    def work() -> int:
        measured = coverage.Coverage(data_file=None, include=[str(p) for p in paths], config_file=False)
        measured.start()
        for path in paths:  # here, so that no test counts as the one that imports it
            importlib.import_module(module_name(path))
        watch = Watch(enter=measured.switch_context)
        code = run_pytest(tests, marks, watch)
        measured.stop()
        data = measured.get_data()
        reach = {str(p): data.contexts_by_lineno(str(p)) for p in paths}
        result.write_text(json.dumps([watch.seconds, watch.users, reach]))
        return code

    if in_child(work, 900, output) != 0:
        print(output.read_text())
        sys.exit("error: the tests fail before anything is changed")
    return Baseline(*json.loads(result.read_text()))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def nearest_tests(path: Path) -> list[str]:
    """tests/unit/FOLDER for a module in a folder, tests/unit/test_MODULE*.py for one at the top."""
    below = path.relative_to(ROOT / "lora_vit")
    if len(below.parts) > 1 or path.is_dir():
        return [str(ROOT / "tests" / "unit" / below.parts[0])]
    return [str(p) for p in (ROOT / "tests" / "unit").glob(f"test_{below.stem}*.py")]


def examine(path: Path, baseline: Baseline, args: argparse.Namespace) -> None:
    """Run a module's mutants, print the survivors as diffs and one row for the table."""
    wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
    before = wrapper.module.code
    every = find_mutants(wrapper)
    if args.lines:
        first, last = (int(n) for n in args.lines.split("-"))
        every = [m for m in every if first <= m.lines[-1] and m.lines[0] <= last]
    if args.numbers:
        wanted = {int(n) for n in args.numbers.split(",")}
        every = [m for m in every if m.number in wanted]
    chosen = every
    if args.sample and len(every) > args.sample:
        chosen = sorted(random.Random(args.seed).sample(every, args.sample), key=lambda m: m.number)
    name, killed, late = module_name(path), 0, 0
    print(f"{path.relative_to(ROOT)}: {len(chosen)} of {len(every)} mutants", flush=True)
    for mutant in chosen:
        after = wrapper.module.deep_replace(mutant.node, mutant.replacement).code  # type: ignore[union-attr]
        only = baseline.of(path, mutant.lines)

        def work(after: str = after, only: list[str] = only) -> int:
            sys.meta_path.insert(0, Hook(name, path, after))  # type: ignore[arg-type]
            return run_pytest(sorted({str(ROOT / n.split("::")[0]) for n in only}), args.marks, Watch(only))

        code: int | None = pytest.ExitCode.OK
        if only:
            code = in_child(work, 10 + 3 * sum(baseline.seconds[n] for n in only))
        if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm="")
            reached = f"{len(only)} tests reach it" if only else "no test reaches it"
            print(f"\nsurvivor {mutant.number} ({reached})", *list(lines)[2:], sep="\n", flush=True)
        else:
            killed += 1
            late += code is None
    share = f"{100 * killed / len(chosen):.0f} %" if chosen else ""
    by_time = f", {late} of them by the time limit" if late else ""
    print(f"\n{path.relative_to(ROOT)}: {killed} of {len(chosen)} killed{by_time}")
    row = path.relative_to(ROOT / "lora_vit")
    print(f"| `{row}` | {killed}/{len(chosen)} | {share} | {len(every)} | {time.strftime('%Y-%m-%d')} |\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path, help="a module of lora_vit, or a folder of them")
    parser.add_argument("--tests", nargs="+", help="test files or folders (default: those nearest to the module)")
    parser.add_argument("--sample", type=int, default=150, help="at most so many mutants a module, 0 for all (150)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--lines", help="only mutants of these lines, as FIRST-LAST")
    parser.add_argument("--numbers", help="only these mutants, as 3,17: the survivors of the last run")
    parser.add_argument("--marks", default=QUICK, help=f"pytest's -m (default: {QUICK})")
    args = parser.parse_args()
    target = args.module.resolve()
    paths = sorted(target.rglob("*.py")) if target.is_dir() else [target]
    tests = [str(Path(t).resolve()) for t in args.tests or ()] or nearest_tests(target)
    if not tests:
        sys.exit(f"error: no tests are named after {args.module}: give --tests")
    sys.path.insert(0, str(ROOT / "tests"))
    for package in HEAVY:
        importlib.import_module(package)
    gc.freeze()  # what a fork inherits is no garbage: a collection there would take longer than most tests
    scratch = Path(tempfile.mkdtemp())
    try:
        baseline = measure([p for p in paths if p.stem != "__main__"], tests, args.marks, scratch)
        for path in paths:
            if str(path) in baseline.reach:
                examine(path, baseline, args)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
