"""One step of the net, and the rows that its commands read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import shlex
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Stop:
    """How the first command of a step is interrupted, before it is given again.

    Attributes:
        signal: what is sent, as soon as the process has a handler of its own for SIGTERM (it then is in its main loop)
            and the file has so many lines.
        file: below the scratch folder; empty for none.
        lines: least number of lines of it.
    """

    signal: signal.Signals
    file: str = ""
    lines: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """Commands that one process runs one after the other, with compiled programs in common.

    Attributes:
        name: of the step.
        text: the commands: each is a line ``name: words``, which goes on in lines that are further in.
        needs: steps whose files it reads.
        devices: CPU devices of each process.
        processes: that join, all with the same commands.
        stop: interrupts the first command once.
        bucket: whether ``gs://bucket`` is there; what is in it afterwards is what the commands left.
        script: file of the checkout to run in place of the console script.
        timed: whether the times it prints are of this machine, and so no matter.
        full: whether only ``--full`` asks for it.
    """

    name: str
    text: str
    needs: tuple[str, ...] = ()
    devices: int = 1
    processes: int = 1
    stop: Stop | None = None
    bucket: bool = False
    script: str = ""
    timed: bool = True
    full: bool = False

    def commands(self, short: Mapping[str, str]) -> dict[str, list[str]]:
        """Words of each command, by its name.

        Args:
            short: what the words in braces stand for. NAME stands for the command's name.
        """
        found = {}
        for line in re.sub(r"\n {12,}", " ", self.text).strip().splitlines():
            name, _, words = line.strip().partition(":")
            words = words.replace("NAME", name)
            while "{" in words:
                words = words.format_map(short)
            found[name] = shlex.split(words)
        return found

    @property
    def steady(self) -> bool:
        """Whether counts and memory are a matter of the checkout alone, and not of when a signal or a peer comes."""
        return self.stop is None and self.processes == 1 and not self.bucket


def _write(path: Path, rows: Iterator[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> None:
    """Writes the rows that commands read: small, always the same, with answers that the embedded model gets wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    names, things, colors = ("Ray", "Zoe", "Sue", "Leo", "Mia"), ("pots", "maps", "lamps", "dolls"), ("blue", "gray")

    def pairs(seed: int, count: int, start: int) -> Iterator[tuple[str, str]]:
        draw = random.Random(seed)
        for number in range(start, start + count):
            who, what, color = draw.choice(names), draw.choice(things), draw.choice(colors)
            asked = f"{who} has {number} {color} {what}. What color are the {what} of {who}?"
            yield asked, f"{color} {what}, {who}"[::-1] if draw.random() < 0.5 else f"{number} {color}"

    def prompts(seed: int, count: int, start: int) -> Iterator[Mapping[str, object]]:
        return ({"prompt": asked, "response": answer} for asked, answer in pairs(seed, count, start))

    _write(folder / "train.jsonl", prompts(0, 40, 0))
    _write(folder / "test.jsonl", prompts(1, 16, 100))
    _write(folder / "text.jsonl", ({"text": f"{asked} {answer}"} for asked, answer in pairs(2, 8, 200)))
    chat = (
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in pairs(3, 8, 300)
    )
    _write(folder / "chat.jsonl", chat)
    dolly = (
        {
            "instruction": asked,
            "context": "All of them." if len(asked) % 2 else "",
            "response": answer,
            "category": "qa",
        }
        for asked, answer in pairs(4, 520, 400)
    )
    _write(folder / "dolly.jsonl", dolly)
    copied = ("pots", "maps", "lamps", "dolls", "coins", "drums", "pens", "bikes", "forks", "cats")

    def facts(new: bool) -> Iterator[Mapping[str, object]]:
        for number, thing in enumerate(copied[::-1] if new else copied):
            about = {"target": copied[number], "old": thing} if new else {"target": thing}
            yield {"prompt": "Zoe makes gray {}. What does Zoe make? Zoe makes gray", "subject": thing, **about}

    _write(folder / "facts.jsonl", facts(new=False))  # of which the embedded model says nine
    _write(folder / "new_facts.jsonl", itertools.islice(facts(new=True), 0, 3))
    _write(folder / "more_facts.jsonl", itertools.islice(facts(new=True), 3, 5))
