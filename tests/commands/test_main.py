"""What the command does before any work: help, and one line for every mistake."""

from __future__ import annotations

import importlib
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import types

import pytest

import jaxcrit
from jaxcrit.commands import main as cli
from jaxcrit.commands.completion import script
from jaxcrit.core import flags
from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import ProcessOptions
from jaxcrit.core.options import Options, options_of

MISTAKES = {
    "analyse": "did you mean 'analyze'?",
    "--hlep": "did you mean '--help'?",
    "analyze --modle=x": "unknown flag --modle (did you mean 'model'?)",
    "analyze --window=abc": "--window=abc: expected a whole number",
    "finetune --learning_rate=abc": "--learning_rate=abc: expected a number",
    "help analyse": "did you mean 'analyze'?",
    "completion bsh": "did you mean 'bash'?",
    "completion": "expected bash, zsh or fish, got nothing",
    "analyze --batch_size=0": "--batch_size=0",
    "analyze --limit=-1": "--limit=-1",
    "analyze --kernel=lnear": "did you mean 'linear'?",
    "analyze --embed=perhaps": "--embed=perhaps",
    "analyze --out": "--out",
    "analyze stray": "expected flags only, got 'stray'",
    "analyze model=x": "did you mean --model=x?",
    "analyze --seed=1 -- --limit=3": "expected flags only",
    "analyze --truncate=lef": "did you mean 'left'?",
    "inspect /absent": "/absent",
    "inspect one two": "expected MODEL, got one two",
    "inspect --template=lama3": "did you mean 'llama3'?",
    "inspect --out=x": "unknown flag --out",
    "inspect --step=3": "is no finetune run, and has no steps",
    "data --template=lama3": "did you mean 'llama3'?",
    "data --edition=papr": "did you mean 'paper'?",
    "data --data=dolly:x --split=tset": "did you mean 'test'?",
    "data --model=/absent": "/absent",
    "generate --temprature=1": "did you mean 'temperature'?",
    "generate --max_new_tokens=0": "--max_new_tokens=0",
    "generate --top_k=5": "give a --temperature above 0",
    "generate --stop=</w>": "did you mean '</s>'?",
    "generate --stop=793": "'793' is no token id",
    "generate --max_new_tokens=256": "leaves no room for a prompt in the model's context of 256 tokens",
    "select": "expected --scores=FILE",
    "select --scores=/absent.json": "/absent.json: no such file",
    "explore": "expected jaxcrit explore RUN [RUN ...] --out=page.html",
    "explore /absent --out=page.html": "/absent: no such run directory",
    "export": "expected --model=DIR",
    "export --model=x": "expected --out=DIR",
    "export --run=nosuch --out=y": "--run=nosuch: no such directory",
    "export --model=x --out=y --dtype=float23": "did you mean 'float32'?",
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.items())
def test_a_mistake_is_one_line_and_exit_2(arguments, message, capsys):
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxcrit: error: ") and message in err
    assert err.count("\n") == 1


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, summary) in cli.COMMANDS.items():
        assert f"  {name:<10} {summary}\n" in out
    assert cli.main([]) == 2
    assert capsys.readouterr().err == out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command_has_one_line_per_flag_within_100_columns(command, capsys):
    assert cli.main([command, "--model=x", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    module = importlib.import_module(cli.COMMANDS[command][0])
    for flag in [flag for kind in (module.OPTIONS, *cli.further(module)) for flag in options_of(kind)]:
        rows = [line for line in lines if line.strip().startswith((f"--{flag.name}=", f"--[no]{flag.name} "))]
        assert len(rows) == 1
        assert flag.help in rows[0]
        if flag.default not in ("", (), None, True, False):
            assert rows[0].endswith(f"[{flag.default}]")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    assert cli.main(["help", command]) == 0
    (example,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("example: ")]
    program, name, *rest = shlex.split(example.removeprefix("example: "))
    assert (program, name) == ("jaxcrit", command)
    module = importlib.import_module(cli.COMMANDS[command][0])
    flags.read([module.OPTIONS, ProcessOptions, *cli.further(module)], command, rest)


COMPLETED = {
    "ana": "analyze",
    "help sel": "select",
    "analyze --win": "--window=",
    "analyze --noe": "--noembed",
    "analyze --kernel = l": "linear",
    "finetune --mode =": "freeze only",
    "finetune --data = tra": "train.jsonl",
}


@pytest.mark.parametrize(("typed", "completed"), COMPLETED.items())
def test_bash_completes_commands_flags_choices_and_files(typed, completed, tmp_path, bash_script):
    (tmp_path / "train.jsonl").touch()
    words = ["jaxcrit", *typed.split()]
    ask = (
        f"compopt() {{ :; }}; . {bash_script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _jaxcrit"
    )
    done = subprocess.run(
        ["bash", "-c", f"{ask}; echo ${{COMPREPLY[@]}}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (sorted(done.stdout.split()), done.stderr) == (completed.split(), "")


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    file = tmp_path_factory.mktemp("completion") / "jaxcrit.bash"
    file.write_text(script(["bash"]))
    return file


def needed(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")


def test_fish_completes_them_too(tmp_path):
    needed("fish")
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "script").write_text(script(["fish"]))
    asked = {"ana": "analyze", "help sel": "select", "analyze --win": "--window", "analyze --noe": "--noembed"}
    asked |= {
        "finetune --long=d": "--long=drop",
        "finetune --data=tra": "--data=train.jsonl",
        "comp": "compare completion",
    }
    lines = ["source script", *(f"echo = (complete -C 'jaxcrit {typed}' | cut -f 1)" for typed in asked)]
    fish = ["fish", "--no-config", "-c", "\n".join(lines)]
    done = subprocess.run(fish, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)})
    assert [line[2:] for line in done.stdout.splitlines()] == list(asked.values()), done.stderr


def test_zsh_completes_them_too(tmp_path):
    """Typed with a tab into a shell of its own, where a function of the command's name says what it was given."""
    needed("zsh")
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "_jaxcrit").write_text(script(["zsh"]))
    asked = {"jaxcrit ana": "analyze", "jaxcrit help ed": "help edit", "jaxcrit analyze --lim": "analyze --limit="}
    asked |= {"jaxcrit analyze --noe": "analyze --noembed", "jaxcrit finetune --long=d": "finetune --long=drop"}
    asked |= {"jaxcrit data --data=tra": "data --data=train.jsonl"}
    found = f"fpath=({shlex.quote(str(tmp_path))} $fpath); autoload -Uz compinit; compinit -u -D"
    setup = f"PS1='> '; {found}; jaxcrit() {{ print -r -- G''OT:$*:END }}"
    ours, its = pty.openpty()
    env = {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(tmp_path)}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), its)
    shell = subprocess.Popen(["zsh", "-f"], cwd=tmp_path, env=env, start_new_session=True, **streams)
    try:
        os.write(ours, f"{setup}; jaxcrit ready\r".encode())
        assert given(ours) == "ready"
        for typed, completed in asked.items():
            for pause in (0.2, 1, 4):  # a busy machine's shell may not have taken the tab before the line's end
                time.sleep(pause)
                os.write(ours, f"{typed}\t".encode())
                time.sleep(pause)
                os.write(ours, b"\r")
                if (said := given(ours)) == completed:
                    break
            assert said == completed
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
        os.close(its)


def given(terminal: int) -> str:
    """What the function in the shell says that it was given."""
    text = ""
    while "END" not in text.partition("GOT:")[2]:
        assert select.select([terminal], [], [], 20)[0], text
        text += os.read(terminal, 4096).decode()
    return text.partition("GOT:")[2].partition(":END")[0]


def test_every_shell_is_told_every_flag():
    for shell, form in {"zsh": " --{}=", "fish": " -l {} "}.items():
        told = script([shell])
        for name in ("window", "learning_rate", "cluster_nmi.clusters", "rehash"):
            assert form.format(name).rstrip("=" if name == "rehash" else "") in told, (shell, name)


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "jaxcrit", "--version"], capture_output=True, text=True)
    assert done.stdout == f"jaxcrit {jaxcrit.__version__}\n"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxcrit {jaxcrit.__version__}\n"


@pytest.mark.parametrize(
    "arguments", ["--help", "analyze --help", "data --help", "export --help", "select --help", "score --help"]
)
def test_help_imports_nothing_slow(arguments):
    code = (
        "import sys; from jaxcrit.commands.main import main; code = main(sys.argv[1:]);"
        " slow = {'jax', 'flax', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules); assert not slow, slow;"
        " sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def command_that(monkeypatch, act):
    module = types.ModuleType("fake_command")
    module.OPTIONS, module.run = Options, act
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "for a test"))


def raising(error):
    def act(values):
        raise error

    return act


def test_exit_codes_of_what_happens_inside(monkeypatch, capsys):
    command_that(monkeypatch, raising(UserError("expected a, got b")))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "jaxcrit: error: expected a, got b\n"
    command_that(monkeypatch, raising(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert "Traceback" not in capsys.readouterr().err


class PanicException(BaseException):
    """As a library in Rust raises it, which is no `Exception`."""


@pytest.mark.parametrize("error", [ZeroDivisionError("a\nb"), MemoryError(), RecursionError(), PanicException("index")])
def test_what_nobody_expected_is_one_line_and_a_written_traceback(error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command_that(monkeypatch, raising(error))
    assert cli.main(["fake"]) == 1
    told, (file,) = capsys.readouterr().err, list(tmp_path.iterdir())
    assert told.startswith(f"jaxcrit: error: unexpected {type(error).__name__}: ") and told.count("\n") == 1
    assert f"the traceback is in {file}" in told and "in raising" in file.read_text().replace("act", "raising")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert cli.main(["fake"]) == 1 and "cannot be written" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from jaxcrit.commands import main as m;"
        " m.overview = lambda: 'line\\n' * 100000; sys.exit(m.main(['--help']))"
    )
    command = f'{sys.executable} -c "{code}" | head -n 1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.split() == ["line", "141"]
    assert done.stderr == ""


def test_output_that_goes_nowhere():
    """A full disk is one line; closed streams lead nowhere, and no file is opened in their place."""
    program = [sys.executable, "-m", "jaxcrit.commands.main"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*program, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "jaxcrit: error: what is printed cannot be written: No space left on device\n"
    closed = "exec <&- >&- 2>&-; exec " + " ".join([*program, "--help"])
    assert subprocess.run(["bash", "-c", closed]).returncode == 0
