"""Commands as processes: one parser, light imports, one line for each error, streams of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_vit import cli
from lora_vit.errors import RecordError

NAMES = ("train", "fetch", "sweep", "summarize", "track", "evaluate", "predict", "merge", "export", "cut",
         "ranks")  # fmt: skip
PRINTS = "print('\\u2013')"


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return ended([sys.executable, "-c", code], **options)


def ended(line: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, **options)


def script(action: str) -> str:
    return f"import os, sys\nfrom lora_vit import errors\nwith errors.reporting():\n    {action}"


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        ("sys.exit(3)", 3, ""),
        ("raise errors.ConfigError('lora.rank=0 is impossible')", 1, "error: lora.rank=0 is impossible\n"),
        ("os.environ['HYDRA_FULL_ERROR'] = '1'; raise errors.RecordError('mend x')", 1, "error: mend x\n"),
        ("raise errors.Interrupted(15)", 143, "interrupted by SIGTERM: saved; the same command resumes\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise OSError(28, 'No space', 'there')", 1, "error: there cannot be written (No space): make room"),
        ("raise PermissionError(13, 'Denied', 'there')", 1, "error: there cannot be written or read (Denied): give"),
        ("raise FileNotFoundError(2, 'No such file', 'there')", 1, "error: there is gone"),
        ("raise ImportError('t.so: failed to map segment')", 1, "error: too little memory to load a library (t.so"),
        ("raise ImportError('no such name')", 1, "Traceback"),
        ("raise KeyError('x')", 1, "Traceback"),
    ],
)
def test_each_end_has_its_code_and_its_line(action, code, words):
    done = python(script(action))
    assert (done.returncode, done.stderr[: len(words)], done.stdout) == (code, words, "")
    assert words == "Traceback" or done.stderr.count("\n") == (1 if words else 0)


def test_a_terminal_without_the_sign_and_streams_that_are_closed():
    done = python(script(PRINTS), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u2013\n", "")
    closed = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script(PRINTS)]
    assert subprocess.run(closed, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(("action", "code"), [(PRINTS, 0), ("print('x', flush=True)", 1)])
def test_a_reader_that_has_gone(action, code):
    reading, writing = os.pipe()
    os.close(reading)
    line, env = [sys.executable, "-c", script(action)], {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(line, env=env, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_clone_that_is_not_installed_says_what_to_do(project_root, tmp_path):
    (tmp_path / "lora_vit").symlink_to(project_root / "lora_vit")
    done = ended([sys.executable, "-S", "-m", "lora_vit.evaluate", "x"], cwd=tmp_path)  # -S: nothing is installed
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: lora_vit is not installed in this Python: run `")
    assert f"pip install -e {project_root}`" in done.stderr


def test_importing_changes_nothing_in_the_process():
    state = "[*map(signal.getsignal, signal.Signals), sys.excepthook, sys.stdout, sys.stdout.errors, sys.path[:]]"
    code = f"import signal, sys; sys.argv = ['-m']; was = {state}; import lora_vit; print({state} == was)"
    assert python(code).stdout == "True\n"


LIGHT = ("--help", "evaluate --help", "export nowhere", "train --help", "train --cfg job")


@pytest.mark.parametrize("arguments", LIGHT)
def test_what_needs_no_library_imports_none(arguments, tmp_path):
    libraries = ["torch"] if "train" in arguments else ["torch", "numpy", "pandas", "hydra", "rich"]
    heavy = f"print(*sorted({{*{libraries}}} & set(sys.modules)), file=sys.stderr)"
    code = f"import atexit, sys; sys.argv = ['lora-vit', *{arguments.split()}]; atexit.register(lambda: {heavy})"
    done = python(f"{code}; from lora_vit.cli import main; main()", cwd=tmp_path)
    assert (done.stderr.splitlines()[-1], list(tmp_path.iterdir())) == ("", [])


def test_the_top_names_every_command(call):
    assert tuple(cli.COMMANDS) == NAMES
    _, said, _ = call(None, "--help")
    for name, (module, what) in cli.COMMANDS.items():
        assert f"    {name}" in said
        assert what[:40] in said
        offered = vars(import_module(module))
        assert ("add_arguments" in offered and "run" in offered) or "main" in offered


@pytest.mark.parametrize(("arguments", "words"), [([], "COMMAND"), (["trian"], "trian"), (["merge", "x"], "--out")])
def test_what_is_missing_or_unknown_is_named(arguments, words, call):
    code, _, said = call(None, *arguments)
    assert code == 2
    assert words in said.splitlines()[-1]


def test_a_sweep_or_a_run_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a b", "outputs/sweeps/a b", "outputs/runs/a b", "outputs/runs/one", "one", "two"):
        (tmp_path / folder).mkdir(parents=True)
    given = {"a b": "outputs/sweeps/a b", "one": "outputs/runs/one", "two": "two", "./a b": "a b", "..": "..", ".": ".",
             "outputs/runs/a b": "outputs/runs/a b", "none": "none"}  # fmt: skip
    assert {text: cli.named(text) for text in given} == {text: Path(path) for text, path in given.items()}


@pytest.mark.parametrize("name", NAMES[:-1])  # ranks is a second name of cut
def test_both_ways_to_a_command(name, tmp_path, call):
    done = ended([sys.executable, "-m", f"lora_vit.{name}", "--help"], cwd=tmp_path)
    assert done.returncode == 0
    if name != "train":  # Hydra's own
        assert call(None, name, "--help") == (0, done.stdout, "")


@pytest.mark.parametrize(("name", "said"), [("x", "a trial's folder, or a"), ("adapter.json", "and merge_adapter")])
def test_a_folder_without_a_trial(name, said, tmp_path):
    """That of an adapter from somebody's own loop says who takes it."""
    (tmp_path / name).touch()
    with pytest.raises(RecordError, match=said):
        cli.completed_trial(tmp_path, None, "cpu")


def test_a_command_finds_modules_in_the_current_folder(call, monkeypatch, tmp_path):
    """As ``python -m`` does: ``data.target``, trackers and engines of one's own lie there."""
    (tmp_path / "lies_beside.py").write_text("")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    assert find_spec("lies_beside") is None
    assert call(None, "--version")[0] == 0
    assert find_spec("lies_beside") is not None
