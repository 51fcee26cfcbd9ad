"""``jaxcrit COMMAND [flags]``: finds the command, reads its flags, turns a user's mistake into one line and exit 2.

Commands are imported when they are run, so that help answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

import jaxcrit
from jaxcrit.core import console, flags, options, processes
from jaxcrit.core.errors import UserError, did_you_mean, first_line, is_error
from jaxcrit.core.groups import ProcessOptions
from jaxcrit.core.pages import keep_pages
from jaxcrit.core.programs import keep_programs
from jaxcrit.parallel.preemption import INTERRUPTED, Preempted, leaving_at_once

# What it is for: name: (module, one line). A module has OPTIONS, a subclass of `Options`, and run(options) -> exit
# code. It may have extra() -> further classes of options, whose instances run is given too.
GROUPS = {
    "find layers": {
        "analyze": ("jaxcrit.commands.analyze", "find the critical layers of a model, and say how sure that is"),
        "score": ("jaxcrit.commands.score", "score layers by other criteria: weights, states, gradients"),
        "correlate": ("jaxcrit.commands.correlate", "compare two scores of the layers, or every score in a folder"),
        "explore": ("jaxcrit.commands.explore", "one page over any number of runs, to be opened offline"),
        "select": ("jaxcrit.commands.select", "choose layers again from scores.json, in the words of another trainer"),
    },
    "look inside": {
        "inspect": (
            "jaxcrit.commands.inspect",
            "what would be read of a model: files, keys, stops, what is trained on",
        ),
        "data": ("jaxcrit.commands.data", "show what a model will see of a dataset: rows, mask, lengths"),
        "generate": ("jaxcrit.commands.generate", "write a model's answers to every prompt"),
        "spectrum": ("jaxcrit.commands.spectrum", "principal components of every layer, and which of them track δ"),
        "verify": ("jaxcrit.commands.verify", "whether run directories are what they claim, by digests and Grams"),
        "compare": (
            "jaxcrit.commands.compare",
            "CKA between two models over the same prompts, from their fingerprints",
        ),
        "intervene": ("jaxcrit.commands.intervene", "remove components, or steer, and see what an answer becomes"),
        "ablate": ("jaxcrit.commands.ablate", "put each layer out of action: loss and right answers without it"),
        "screen": ("jaxcrit.commands.screen", "flag prompts unlike the benign ones of their class, layer by layer"),
        "trace": ("jaxcrit.commands.trace", "where facts are: what each layer brings back of an answer"),
    },
    "train and test": {
        "plan": ("jaxcrit.commands.plan", "what a job needs on TPUs or GPUs that are not here, and whether it fits"),
        "finetune": ("jaxcrit.commands.finetune", "train exactly the layers you choose"),
        "edit": ("jaxcrit.commands.edit", "change facts in a few layers, and see what else changed"),
        "substitute": (
            "jaxcrit.commands.substitute",
            "put layers of the base into the tuned model: what each is worth",
        ),
        "reuse": (
            "jaxcrit.commands.reuse",
            "whether a model may go on from another's KV cache, and which layers to recompute",
        ),
        "remix": (
            "jaxcrit.commands.remix",
            "other shares for a mixture's experts, row by row, and what they win and lose",
        ),
        "backdoor": (
            "jaxcrit.commands.backdoor",
            "whether freezing layers keeps poisoned data from planting a backdoor",
        ),
        "prune": ("jaxcrit.commands.prune", "leave layers out of a model, and see what that costs beside others"),
        "export": ("jaxcrit.commands.export", "write a checkpoint directory that transformers loads"),
    },
}
# What a user types first; a test parses each.
EXAMPLES = {
    "analyze": "jaxcrit analyze --model=DIR --data=gsm8k:train.jsonl --limit=300 --out=an",
    "score": "jaxcrit score --model=DIR --data=train.jsonl --criteria=fisher,block_influence --out=sc",
    "correlate": "jaxcrit correlate --scores=an:delta_debiased --scores=sub --out=cor",
    "select": "jaxcrit select --scores=an --layers=critical:4 --format=peft --out=peft.json",
    "inspect": "jaxcrit inspect DIR",
    "data": "jaxcrit data --model=DIR --data=gsm8k:train.jsonl --limit=3",
    "generate": "jaxcrit generate --model=DIR --data=test.jsonl --max_new_tokens=128 --out=answers",
    "spectrum": "jaxcrit spectrum --model=DIR --data=gsm8k:train.jsonl --limit=300 --out=sp",
    "verify": "jaxcrit verify an ft",
    "compare": "jaxcrit compare an an-tuned --out=cmp",
    "intervene": "jaxcrit intervene --model=DIR --data=test.jsonl --layers=14 --components=0 --mode=project",
    "ablate": "jaxcrit ablate --model=DIR --data=gsm8k:test.jsonl --limit=64 --out=ab",
    "screen": "jaxcrit screen --model=DIR --benign=good.jsonl --data=new.jsonl --out=flags",
    "trace": "jaxcrit trace --model=DIR --facts=facts.jsonl --out=tr",
    "plan": "jaxcrit plan --model=meta-llama/Llama-3.1-8B --topology=4090:2 --layers=14-17 --search",
    "finetune": "jaxcrit finetune --model=DIR --data=gsm8k:train.jsonl --layers=@an --long=drop --out=ft",
    "edit": "jaxcrit edit --model=DIR --facts=facts.jsonl --covariance_data=text.jsonl --layers=4-8",
    "substitute": "jaxcrit substitute --base=DIR --tuned=all --data=gsm8k:test.jsonl --limit=64 --out=sub",
    "reuse": "jaxcrit reuse --sender=DIR --receiver=ft --data=test.jsonl --limit=64 --out=re",
    "remix": "jaxcrit remix --model=DIR --reference=train.jsonl --data=test.jsonl --out=mix",
    "backdoor": "jaxcrit backdoor --model=DIR --data=dolly:train.jsonl --seeds=1 --steps=200 --out=bd",
    "explore": "jaxcrit explore runs/one runs/two --out=page.html",
    "prune": "jaxcrit prune --model=DIR --data=test.jsonl --drop=block_influence:4 --scores=sc --out=cut",
    "export": "jaxcrit export --run=ft --out=tuned",
}
COMMANDS = {name: row for group in GROUPS.values() for name, row in group.items()}
# Commands that run no model: of several processes the first does it all.
FIRST_ONLY = ("inspect", "data", "explore", "select", "correlate", "compare", "verify", "plan", "export")
# Commands that train: what a step frees, the next one takes again.
TRAINS = ("finetune", "backdoor")
# Advice about torch and start-up notes of XLA say nothing to somebody who runs jaxcrit.
QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
FAILED, BAD_USAGE, PREEMPTED, BROKEN_PIPE = 1, 2, 75, 141  # 75: EX_TEMPFAIL, try again


def overview() -> str:
    """The help page of ``jaxcrit`` itself."""
    rows: list[str] = []
    for title, group in GROUPS.items():
        rows += [f"{title}:", *(f"  {name:<10} {summary}" for name, (_, summary) in group.items()), ""]
    return "\n".join(
        [
            "jaxcrit: find the critical layers of a language model.",
            "",
            "usage: jaxcrit [--help|--version] COMMAND [flags]",
            "",
            *rows,
            "jaxcrit help COMMAND lists the flags of a command, after an example. jaxcrit analyze, without any,",
            "runs on a small embedded model. jaxcrit completion bash|zsh|fish prints a script for the shell.",
        ]
    )


def dispatch(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code.

    Raises:
        UserError: unknown command or flag, or whatever the command finds wrong with its input.
    """
    if not arguments:
        print(overview(), file=sys.stderr)
        return BAD_USAGE
    name, *rest = arguments
    if name == "help" and len(rest) == 1 and not rest[0].startswith("-"):
        name, rest = rest[0], ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview())
        return 0
    if name == "completion":
        from jaxcrit.commands.completion import script

        print(script(rest), end="")
        return 0
    if name == "--version":
        print(f"jaxcrit {jaxcrit.__version__}")
        return 0
    if name not in COMMANDS:
        what = "flag" if name.startswith("-") else "command"
        nearest = did_you_mean(name, ["--help", "--version"] if what == "flag" else COMMANDS)
        raise UserError(f"unknown {what} {name!r}{nearest}; expected one of {', '.join(COMMANDS)}")
    module_name, summary = COMMANDS[name]
    module = importlib.import_module(module_name)
    if "--help" in rest or "-h" in rest:
        print(options.usage(module.OPTIONS, name, summary, ProcessOptions, further(module), EXAMPLES.get(name, "")))
        return 0
    asked, ours, *own = flags.read([module.OPTIONS, ProcessOptions, *further(module)], name, rest)
    with contextlib.ExitStack() as stack:
        _join(name, [asked, *own], ours, stack)
        if name in FIRST_ONLY:
            return int(processes.share(lambda: module.run(asked, *own)))
        if not processes.first():
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(null))
        return int(module.run(asked, *own))


def further(module: ModuleType) -> list[type[options.Options]]:
    """Classes of options that a command has beside its own."""
    return module.extra() if hasattr(module, "extra") else []


def _join(name: str, asked: Sequence[options.Options], ours: ProcessOptions, stack: contextlib.ExitStack) -> None:
    """Starts jax as `ProcessOptions` say; the form of attention is asked for until the stack closes."""
    from jaxcrit.parallel.distributed import start

    if ours.attention != "auto":
        from jaxcrit.models.attention import ASKED

        stack.callback(ASKED.reset, ASKED.set(ours.attention))
    if ours.rehash:
        from jaxcrit.models.checkpoint import REHASH

        stack.callback(REHASH.reset, REHASH.set(True))
    keep_programs(ours.compilation_cache_dir)
    about = {"jaxcrit": jaxcrit.__version__, "python": platform.python_version(), "command": name}
    about |= {package: metadata.version(package) for package in ("jax", "jaxlib")}
    about |= {f"--{option}": str(value) for one in asked for option, value in options.as_json(one).items()}
    start(
        ours.distributed,
        coordinator=ours.coordinator,
        num_processes=ours.num_processes,
        process_id=ours.process_id,
        timeout=ours.distributed_timeout,
        about=about,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``jaxcrit`` command; returns the exit code."""
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    if arguments is None:
        console.open_what_is_closed()
    console.spell_what_cannot_be_shown()
    if arguments is None and any(name in TRAINS for name in sys.argv[1:2]):  # the process is ours
        keep_pages()
    try:
        with leaving_at_once(), console.remarks_last():
            code = dispatch(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _ended(str(error), BAD_USAGE)
    except Preempted as error:
        console.note(f"jaxcrit: {error}")
        return INTERRUPTED if error.by_hand else PREEMPTED
    except KeyboardInterrupt as error:
        console.tell(f"jaxcrit: interrupted{'; ' if error.args else ''}{''.join(map(str, error.args))}", error=True)
        processes.leave(INTERRUPTED)  # which would wait for the others
        return INTERRUPTED
    except BrokenPipeError:
        _print_no_more()  # the reader has gone (| head)
        return BROKEN_PIPE
    except BaseException as error:
        if not is_error(error):
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            # Of a file: the disk is full, the bucket no longer lets itself be written, the share is gone.
            return _ended(f"{error.filename}: {error.strerror}", FAILED)
        if isinstance(error, OSError) and error.errno in NO_ROOM:  # files have names
            _print_no_more()
            return _ended(f"what is printed cannot be written: {error.strerror}", FAILED)
        return _ended(f"unexpected {type(error).__name__}: {first_line(error)}", FAILED, _kept(error))


def _print_no_more() -> None:
    """Lets what is still to be printed go nowhere; Python would complain once more when it closes stdout on exit."""
    with contextlib.suppress(OSError):  # a stream in the place of stdout has no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ended(text: str, code: int, more: str = "") -> int:
    """Says in one line why a run ends, in one of several processes; takes the others along where they would wait."""
    speaks, alike = processes.agree_on_failure(text, code)
    who = "" if processes.first() else f"process {processes.place()[0]}: "
    if speaks:
        console.tell(f"jaxcrit: error: {who}{text}{more}".replace("\n", "\\n"), error=True)
    if not alike:
        os._exit(code)  # the others wait for this process; that it is gone is all that ends them
    return code


def _kept(error: BaseException) -> str:
    """Writes the traceback of an error that nobody expected, and says where."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="jaxcrit-", suffix=".txt", delete=False
        ) as file:
            file.write(f"jaxcrit {jaxcrit.__version__}: {sys.argv}\n\n{''.join(traceback.format_exception(error))}")
    except OSError:
        return "; its traceback cannot be written, for no temporary directory takes it"
    return f"; the traceback is in {file.name}: please report it"


if __name__ == "__main__":
    sys.exit(main())
