"""The command itself: fast help, exit codes, one sentence, one object, quiet ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from prairie.cli import main as module
from prairie.cli.main import COMMANDS, _Commands
from prairie.errors import DataError

HEAVY = ("torch", "sqlalchemy", "transformers", "rich", "numpy", "pydantic", "fastapi", "yaml", "httpx")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


def commands_of(command, path):
    """(path, command) of every command that can be called below a command."""
    below = getattr(command, "commands", None)
    if not below:
        return [(path, command)]
    return [pair for name, child in below.items() for pair in commands_of(child, f"{path} {name}")]


def test_help_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom prairie.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n"
        f"    print([m for m in {HEAVY!r} if m in sys.modules], end.code, file=sys.stderr)"
    )
    took = []  # seconds of a processor: other tests may run beside this one
    for _ in range(3):
        before = os.times()
        done = python(code)
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.stderr.strip() == "[] 0"
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert min(took) < 1.0, f"wanted about 0.2 s, the best was {min(took):.2f} s"


def test_command_modules_load_nothing_heavy():
    """Their work is imported when they work: `prairie serve --help` must not load torch either."""
    modules = sorted({where.partition(":")[0] for where, _ in COMMANDS.values()})
    done = python(f"import sys, {', '.join(modules)}\nprint([m for m in {HEAVY!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_and_home_and_a_help_text(name):
    command = _Commands(name="prairie").get_command(None, name)
    for path, each in commands_of(command, name):
        options = {option for parameter in each.params for option in parameter.opts}
        assert {"--json", "--home"} <= options, f"prairie {path}"
        assert each.help, f"prairie {path}"


def test_help_names_the_commands_of_the_house():
    assert {"demo", "run", "models", "chat", "evaluate", "serve", "turn", "gate", "feedback", "keys", "doctor"} <= set(
        COMMANDS
    )


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0 and re.match(r"prairie \d+\.\d+", out)


def test_the_end_looks_for_no_cycles_and_loses_nothing(tmp_path):
    """What was registered runs before, what was said is heard, and the exit code is that of the command."""
    code = f"""
import atexit, gc, sys, tempfile
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))  # registered before the command: runs behind it
kept = tempfile.TemporaryDirectory(dir={str(tmp_path)!r})
kept.cycle = kept
from prairie.cli.main import main
print("said", end=" ")
main(["models", "--nothing-of-that-name"])
"""
    done = python(code)
    assert (done.returncode, done.stdout.strip()) == (2, "said frozen True"), done.stderr
    assert not list(tmp_path.iterdir()), "a folder that was to go at the end stayed"


def test_python_m_prairie():
    done = subprocess.run([sys.executable, "-m", "prairie", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout[:8]) == (0, "prairie ")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["modles"], "No such command 'modles'. Did you mean 'models'?"),
        (["models", "lst"], "No such command 'lst'. Did you mean 'list'?"),
        (["models", "list", "--jsn"], "No such option: --jsn"),
        (["models", "show"], "Missing argument 'NAME'"),
        (["models", "list", "extra"], "unexpected extra argument"),
        (["feedback", "list", "--limit", "none"], "Invalid value for '--limit'"),
        (["run", "spark", "--threads", "0"], "Invalid value for '--threads': Input should be greater than"),
    ],
)
def test_wrong_usage_is_2_and_a_sentence(call, arguments, sentence):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and sentence in err and "--help`." in err


def test_options_that_contradict_each_other(call):
    code, out, err = call("serve", "--dtype", "float32", "--quantize", "int8")
    assert code and not out and "--dtype and --quantize both say how weights are kept: got float32 and int8" in err


def test_no_command_shows_the_help(call):
    for arguments in ([], ["models"]):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "") and "Commands:" in err


@pytest.fixture
def command(monkeypatch):
    """Makes `prairie try` call a function."""

    def make(function):
        here = type(sys)("a_command_of_a_test")
        here.function = function
        monkeypatch.setitem(sys.modules, here.__name__, here)
        monkeypatch.setitem(module.COMMANDS, "try", (f"{here.__name__}:function", "A test."))

    return make


def test_an_error_of_ours_is_one_sentence_and_1(call, command):
    def function() -> None:
        raise DataError("row 17 has no answer", got="nothing", wanted="text", mend="add one")

    command(function)
    assert call("try") == (1, "", "error: row 17 has no answer: got nothing, wanted text; add one.\n")


def test_an_unexpected_error_is_one_sentence_that_names_a_log(call, command, root, tmp_path):
    def function(home: str = typer.Option("")) -> None:
        raise ZeroDivisionError("on\npurpose")

    command(function)
    for arguments, folder in (
        ([], root),
        (["--home", tmp_path / "a"], tmp_path / "a"),
        ([f"--home={tmp_path}/b"], tmp_path / "b"),
    ):
        code, out, err = call("try", *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        match = re.fullmatch(r"error: unexpected ZeroDivisionError \(on purpose\); the traceback is in (.*)\.\n", err)
        text = Path(match[1]).read_text()
        assert match[1].startswith(str(folder / "logs"))
        assert (
            "ZeroDivisionError: on\npurpose" in text and "def function" not in err and "raise ZeroDivisionError" in text
        )


def test_the_log_goes_elsewhere_when_home_cannot_be_written(call, command, monkeypatch, tmp_path):
    def function() -> None:
        raise ZeroDivisionError

    command(function)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRAIRIE_HOME", str(tmp_path / "file"))
    code, _, err = call("try")
    assert code == 1 and err.startswith("error: unexpected ZeroDivisionError; the traceback is in /")


@pytest.mark.parametrize(
    "error, code",
    [(KeyboardInterrupt(), 130), (typer.Abort(), 130), (typer.Exit(3), 3), (SystemExit(0), 0), (SystemExit(), 0)],
)
def test_quiet_ends(call, command, error, code):
    def function() -> None:
        raise error

    command(function)
    assert call("try") == (code, "", "")


def test_ctrl_c_in_a_real_process(tmp_path):
    code = (
        "import sys, time\nfrom prairie.cli import main\nhere = type(sys)('here')\n"
        "def wait():\n    print('ready', flush=True)\n    time.sleep(200)\n"
        "here.wait = wait\nsys.modules['here'] = here\nmain.COMMANDS['wait'] = ('here:wait', 'Waits.')\n"
        "main.main(['wait'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_leaves_is_no_error(filled, root):
    """`prairie feedback export | head -1`, with more output than a pipe holds."""
    from prairie.store.feedback import FeedbackEvent
    from prairie.store.home import Home

    with Home(root) as home:
        home.feedback.add(FeedbackEvent("r1", "comment", {"text": "x" * 90_000}))
        home.feedback.add(FeedbackEvent("r1", "comment", {"text": "y" * 90_000}))
    process = subprocess.Popen(
        [sys.executable, "-m", "prairie", "feedback", "export"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), err) == (141, b"")


def test_a_terminal_that_cannot_show_chinese(filled):
    done = subprocess.run(
        [sys.executable, "-m", "prairie", "feedback", "list"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and rb"\u597d" in done.stdout


def test_a_home_that_is_not_there_is_not_made_by_looking(call, tmp_path):
    code, _, err = call("models", "list", "--home", tmp_path / "typo")
    assert code == 1 and "no such home" in err
    assert not (tmp_path / "typo").exists()
