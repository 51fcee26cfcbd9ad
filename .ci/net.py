"""The net: runs two checkouts over a fixed list of commands on this machine, and compares all that they leave.

It is for changes that must change nothing, and for those that must change one thing: run it against a checkout from
before. Both are driven by the ``jaxcrit`` command alone (the function that setup.py names), in processes of their own,
so their modules may lie anywhere. Of each command it compares exit code, standard output and error, every file of the
run directory (arrays, scores, exports and JSON by value; figures by being there; pages by their visible text), the
number of programs that XLA compiled and ran, their operations and their largest temporaries. More than 1.1 times the
memory is a warning. Times, rates and paths do not count.

    git worktree add ../before COMMIT
    python .ci/net.py ../before . --cache=../net                   minutes for a checkout; --full for the long ones too
    python .ci/net.py ../before . --cache=../net --only=analyze,finetune
    python .ci/net.py --list

It needs what jaxcrit needs and nothing more (gcsfs for the step ``bucket``). With --cache, what a checkout without
changes of its own has left is kept by its commit and not run again. One line per command says "equal" or what differs;
differences that are meant go to an allow file, in lines of ``command: path-glob: reason``, and the exit code is 1 if
any other is left. Options that are spelled otherwise in an older or newer checkout: `net_list.RENAMED`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from net_compare import MORE_MEMORY, Allowed, Verdict, compared
from net_list import SHORT, STEPS
from net_record import Place, commit_of, machine, record
from net_step import Step

DIFFERS, BAD_USAGE = 1, 2


def chosen(only: str, full: bool) -> list[Step]:
    """The steps asked for, by names of steps or of commands.

    Raises:
        ValueError: a name is of none.
    """
    if not only:
        return [step for step in STEPS if full or not step.full]
    owners = {command: step for step in STEPS for command in step.commands(SHORT)} | {step.name: step for step in STEPS}
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in owners:
            raise ValueError(f"--only={name}: expected steps or commands of --list")
    wanted = [owners[name] for name in names]
    return [step for step in STEPS if step in wanted]


def recorded(
    checkout: Path, steps: Sequence[Step], given: argparse.Namespace, *, fresh: bool
) -> tuple[Place, dict[str, str]]:
    """The recording of a checkout, made now where it is not in the cache; and why which steps cannot be run."""
    commit = commit_of(checkout)
    if given.cache and commit and not fresh:
        path = Path(given.cache).absolute() / f"{commit[:12]}-{machine()[:8]}"
    elif given.keep and checkout == given.after:
        path = Path(given.keep).absolute()
        shutil.rmtree(path, ignore_errors=True)
    else:
        path = Path(tempfile.mkdtemp(prefix="net-"))
    began = time.monotonic()
    print(f"{checkout} ({commit[:12] or 'not as committed'}) in {path}", flush=True)
    place = Place(checkout.resolve(), path)
    missing = record(
        place, STEPS, [step.name for step in steps], jobs=given.jobs, say=lambda text: print(text, flush=True)
    )
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return place, missing


def shown(verdict: Verdict, allowed: Allowed) -> tuple[str, int]:
    """The lines of a command, and how many of its differences are not allowed."""
    marks = [allowed.covers(verdict.command, difference.path) for difference in verdict.differences]
    words = "equal" if not marks else f"differs in {len(marks)}, all allowed" if all(marks) else "DIFFERS"
    cost = verdict.cost
    if cost.get("exit"):
        words += f"; exit {cost['exit']}"
    if cost.get("runs"):
        words += f"; {cost['compiles']} compiled, {cost['runs']} runs, {cost['flops']:.3g} operations"
    if verdict.memory is not None:
        words += f"; {cost['peak'] / 2**20:.0f} MiB, {verdict.memory:.2f} of before"
        if verdict.memory > MORE_MEMORY:
            words += " WARNING"
    if cost.get("problem"):
        words += f"; {cost['problem']}"
    lines = [f"{verdict.command:<24} {words}"]
    for mark, difference in zip(marks, verdict.differences, strict=True):
        lines.append(f"    {'allowed: ' if mark else ''}{difference}")
    return "\n".join(lines), marks.count(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Records, compares, prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("before", nargs="?", type=Path, help="checkout to compare with")
    parser.add_argument("after", nargs="?", type=Path, help="checkout to compare")
    parser.add_argument("--cache", default="", help="folder of recordings by commit, which are then not made again")
    parser.add_argument("--only", default="", help="steps or commands, with commas; what they need is run too")
    parser.add_argument("--full", action="store_true", help="the long steps too")
    parser.add_argument("--jobs", type=int, default=1, help="steps to run at once")
    parser.add_argument(
        "--allow", type=Path, default=Path(__file__).with_name("net_allow.txt"), help="differences meant"
    )
    parser.add_argument("--fresh", action="store_true", help="run the second checkout even if the cache has it")
    parser.add_argument("--keep", default="", help="where to leave the recording of a second checkout not in the cache")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands")
    given = parser.parse_args(arguments)
    if given.list:
        for step in STEPS:
            print(f"{step.name}{' (--full)' if step.full else ''}")
            for name, words in step.commands(SHORT).items():
                print(f"    {name}: {step.script or 'jaxcrit'} {' '.join(words)}")
        return 0
    if given.before is None or given.after is None:
        parser.error("expected two checkouts")
    try:
        steps, allowed = chosen(given.only, given.full), Allowed.read(given.allow)
        (before, gone_before), (after, gone_after) = (
            recorded(checkout, steps, given, fresh=fresh)
            for checkout, fresh in ((given.before, False), (given.after, given.fresh))
        )
    except ValueError as error:
        print(f"net: error: {error}", file=sys.stderr)
        return BAD_USAGE
    commands, differing, warnings = 0, 0, 0
    for step in steps:
        reasons = gone_before.get(step.name, ""), gone_after.get(step.name, "")
        if any(reasons):
            fine = all(reasons) or allowed.covers(step.name, "@skipped")
            differing += not fine
            print(f"{step.name:<24} {'skipped' if fine else 'DIFFERS'}: {reasons[0] or 'ran'}; {reasons[1] or 'ran'}")
            continue
        for verdict in compared(step, before, after):
            text, left = shown(verdict, allowed)
            print(text)
            commands, differing = commands + 1, differing + bool(left)
            warnings += verdict.memory is not None and verdict.memory > MORE_MEMORY
    unused = [rule for rule, used in zip(allowed.rules, allowed.used, strict=True) if not used]
    if unused and not given.only:
        print(f"allowed, but equal: {'; '.join(': '.join(rule) for rule in unused)}")
    print(
        f"{commands} commands: {commands - differing} equal or allowed, {differing} differ; {warnings} need more memory"
    )
    return DIFFERS if differing else 0


if __name__ == "__main__":
    sys.exit(main())
