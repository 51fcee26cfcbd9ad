"""Options: one declaration serves flags, files, arguments, checks, help, docs and what tells runs apart."""

from __future__ import annotations

import dataclasses
import importlib
import os

import pytest

from jaxcrit.commands.main import COMMANDS, further
from jaxcrit.core.errors import UserError, as_arguments
from jaxcrit.core.flags import read
from jaxcrit.core.options import Options, determining, from_values, option, options_of, table, usage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared(Options, title="shared"):
    data: str = option("", "rows", word="FILE", free="told apart by hash")
    window: int = option(5, "layers to average over", lowest=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Shared, title="own"):
    window: int = option(7, "layers to average over", lowest=3)
    rate: float = option(0.5, "share of rows", above=0, highest=1)
    kind: str = option("linear", "kernel", ("linear", "rbf"))
    fast: bool = option(False, "take the short way")
    open: bool | None = option(None, "stay open")
    files: tuple[str, ...] = option((), "files, each by itself")

    def check(self) -> None:
        super().check()
        if self.fast and self.kind == "rbf":
            raise UserError("--fast: expected --kind=linear beside it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefixed(Options, title="clusters", prefix="clusters"):
    count: int = option(50, "clusters", lowest=2)


def test_flags_become_an_instance():
    words = ["--window=9", "--fast", "--noopen", "--files=a", "--files=b", "--clusters.count=4"]
    own, prefixed = read([Own, Prefixed], "test", words)
    assert own == Own(window=9, fast=True, open=False, files=("a", "b"))
    assert prefixed == Prefixed(count=4)
    assert read([Own], "test", []) == [Own()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data="], "test: --data= names nothing (an unset variable?); expected FILE, or no --data"),
        (["--window=9", "--window=9"], "test: --window is given 2 times; expected it once"),
        (["--data=a", "--rate=1", "--data=b"], "--data is given 2 times; expected it once; several go into one, with"),
    ],
)
def test_slips_that_would_pass_in_silence(words, message):
    with pytest.raises(UserError) as caught:
        read([Own], "test", words)
    assert message in str(caught.value)


def test_python_values_are_converted_where_nothing_is_lost(tmp_path):
    assert Own(rate=1).rate == 1.0
    assert Own(data=tmp_path / "rows").data == str(tmp_path / "rows")
    assert Own(data=["a", "b"]).data == "a,b"
    assert Own(files=["a"]).files == ("a",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 1}, "--window=1: expected 3 or more"),
        ({"window": "7"}, "--window='7': expected a whole number, got str"),
        ({"window": True}, "--window=True: expected a whole number, got bool"),
        ({"window": 3.5}, "--window=3.5: expected a whole number, got float"),
        ({"rate": 0.0}, "--rate=0.0: expected a number above 0"),
        ({"rate": 2.0}, "--rate=2.0: expected 1 or less"),
        ({"rate": float("nan")}, "--rate=nan: expected a finite number"),
        ({"kind": "rfb"}, "--kind=rfb: expected linear or rbf (did you mean 'rbf'?)"),
        ({"fast": 1}, "--fast=1: expected true or false, got int"),
        ({"files": "a"}, "--files='a': expected texts, got str"),
        ({"fast": True, "kind": "rbf"}, "--fast: expected --kind=linear beside it"),
    ],
)
def test_mistakes_are_the_same_for_everybody(given, message):
    with pytest.raises(UserError) as raised:
        Own(**given)
    assert str(raised.value) == message
    with pytest.raises(UserError, match="expected"):
        dataclasses.replace(Own(), **given)


def test_python_reads_arguments_where_the_command_reads_flags():
    assert as_arguments("--window=1: expected 3 or more; give --form=resident") == (
        "window=1: expected 3 or more; give form=resident"
    )
    assert as_arguments("a--b, 3 -- 4, x --clusters.count=5") == "a--b, 3 -- 4, x clusters.count=5"


def test_a_file_gives_what_flags_do_not(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('# mine\nwindow = 9\nkind = "rbf"\nfiles = ["a"]\n\n[clusters]\ncount = 3\n')
    own, prefixed = read([Own, Prefixed], "test", [f"--config={file}", "--window=11"])
    assert own == Own(window=11, kind="rbf", files=("a",))
    assert prefixed.count == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind = 'rbf'\nwindwo = 9\n", "line 2: test has no option 'windwo' (did you mean 'window'?)"),
        ("\nwindow = 'nine'\n", "line 2: --window='nine': expected a whole number, got str"),
        ("[clusters]\ncount = 1\n", "line 2: --clusters.count=1: expected 2 or more"),
        ("window = \n", "expected TOML such as steps = 100, got something else"),
    ],
)
def test_mistakes_in_a_file_say_where(text, message, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"options\.toml") as raised:
        read([Own, Prefixed], "test", [f"--config={file}"])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file; expected options of test in TOML"):
        read([Own], "test", [f"--config={tmp_path / 'absent.toml'}"])


def test_a_file_of_flags(tmp_path):
    (tmp_path / "flags").write_text("--window=9\n# a remark\n--kind=rbf\n")
    assert read([Own], "test", [f"--flagfile={tmp_path / 'flags'}"]) == [Own(window=9, kind="rbf")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"--window=9\xff\n", "expected flags, a line each, got something else"),
        (b"--flagfile=another\n", "got another --flagfile in it"),
        (b"--" + b"w" * 3000 + b"=9\n", "got a word of hundreds of letters"),
        (None, "no such file"),
        ("pipe", "got a device or pipe"),
    ],
)
def test_a_bad_file_of_flags_is_refused(content, message, tmp_path):
    """absl reads a pipe for ever, and looks for the nearest of a long name until Python's stack ends."""
    file = tmp_path / "flags"
    if content == "pipe":
        os.mkfifo(file)
    elif content is not None:
        file.write_bytes(content)
    for words in ([f"--flagfile={file}"], ["--flagfile", str(file)]):
        with pytest.raises(UserError, match=message) as raised:
            read([Own], "test", words)
        assert "\n" not in str(raised.value)


def test_values_by_name():
    assert from_values(Own, {"window": 9}, "run.json") == Own(window=9)
    with pytest.raises(UserError, match=r"run.json: unknown option 'windwo' \(did you mean 'window'\?\)"):
        from_values(Own, {"windwo": 9}, "run.json")


def test_help_and_docs_come_from_the_declaration():
    page = usage(Own, "test", "a test")
    assert page.index("shared:") < page.index("own:")
    assert "  --window=N                        layers to average over [7]" in page
    assert "| `--data=FILE` |  | rows | no: told apart by hash |" in table(Own)
    assert r"| `--kind=linear\|rbf` | linear | kernel | yes |" in table(Own)


OTHER = {
    bool: lambda value: not value,
    int: lambda value: value + 2,
    float: lambda value: value + 0.25,
    str: lambda value: value + "3",
    tuple: lambda value: (*value, "x"),
}
BESIDE = {  # what has to be given for another option to be accepted
    "embed": {"save_activations": True},
    "lora_alpha": {"lora_rank": 2},
    "lora_targets": {"lora_rank": 2},
    "supervise_weight": {"supervise": "2"},
    **{key: {"adversarial": 0.05} for key in ("adversarial_on", "adversarial_steps", "adversarial_weight")},
    "recompute": {"sender": "x", "recompute": "1"},
    "gains": {"methods": "gain", "sites": "mlp"},
    "trigger": {"methods": "gain", "sites": "mlp", "trigger": "cf@prefix", "target": "no"},
    "target": {"methods": "gain", "sites": "mlp", "trigger": "cf@prefix", "target": "no"},
}
GIVEN = {
    "prefix": "context",
    "methods": "skip",
    "method": "mean",
    "layers": "first:2",
    "groups": 2,
    "band": "4",
    "trigger": "cf@suffix",
    "target": "yes",
    "eval_data": "x",
    "template": "chat:own.jinja",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_tells_runs_apart_or_says_why_not(command):
    module = importlib.import_module(COMMANDS[command][0])
    found = [(kind, one) for kind in (module.OPTIONS, *further(module)) for one in options_of(kind)]
    for kind, one in found:
        if one.free:
            assert len(one.free) > 10, f"{command} --{one.name} says why results do not depend on it"
            continue
        beside = {name: value for name, value in BESIDE.get(one.field, {}).items() if hasattr(kind, name)}
        if one.field == "prefix" and hasattr(kind, "recompute"):
            beside = BESIDE["recompute"]
        before = kind(**beside)
        value = getattr(before, one.field)
        others = [word for word in one.choices if word != value]
        changed = others[0] if others else GIVEN.get(one.field) or OTHER[one.kind](value)
        after = kind(**{**beside, one.field: changed})
        assert determining(before) != determining(after), one.name
