"""Chat templates: which one is used, how a conversation is rendered, and where an answer in it ends."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jaxcrit.core.errors import UserError, first_line, listed
from jaxcrit.core.files import local_path
from jaxcrit.core.reading import read_text
from jaxcrit.data import trial

Message = dict[str, Any]
# Llama 3's templates (and others) write today's date into every prompt; a fixed one, Llama's own default, keeps
# the numbers of a run the same tomorrow.
_DATE = datetime.date(2024, 7, 26)
# Words that no template has, so that their places in a rendering say what the template wrote around them.
_ASKED, _ANSWER, _NEXT = "Qvxq", "Avxa", "Nvxn"
# What an answer may hold besides its content; the template then writes more than the content.
_MORE = {"tool_calls", "reasoning_content", "reasoning", "thinking"}


@dataclasses.dataclass(frozen=True)
class Turn:
    """How a chat template writes an answer, found by rendering a conversation, and the same with one more turn.

    Attributes:
        lead: what stands between a prompt and every answer, though the generation prompt lacks it; part of the prompt.
        opening: what the generation prompt has and an answered turn lacks, such as ``<think>``.
        end: text that follows an answer, up to the token that ends the turn.
        tail: text that follows an answer at the end of a conversation.
        token: the token that ends the turn.
        problem: why ``end`` cannot be told, and the rendering; empty where it can.
    """

    lead: str = ""
    opening: str = ""
    end: str = ""
    tail: str = ""
    token: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """A tokenizer's chat template, rendered in the sandbox of transformers."""

    tokenizer: Any
    template: str

    def render(
        self, messages: Sequence[Message], where: str = "", tools: Any = None, *, generation: bool = False
    ) -> str:
        """A conversation as text.

        Args:
            messages: conversation.
            where: row, for messages.
            tools: descriptions of tools as the template takes them, or None.
            generation: whether the opening of the next answer is to follow.

        Raises:
            UserError: the template refuses the conversation.
        """
        _try(self, messages, tools, generation, where)
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except Exception as error:  # what a template does with what it did not expect are errors of Python, of any kind
            front = f"{where}: " if where else ""
            why = first_line(error)
            raise UserError(f"{front}the model's chat template refuses the conversation: {why}") from None

    @functools.cached_property
    def turn(self) -> Turn:
        """How this template writes an answer."""
        return _turn(self)

    def prompt(self, messages: Sequence[Message], where: str = "", tools: Any = None) -> str:
        """What the model is given: a conversation, then what opens its answer.

        Raises:
            UserError: the template refuses the conversation, or leaves out a message of a role such as system or tool.
        """
        text = self.render(messages, where, tools, generation=True)
        for message in messages:
            words = re.findall(r"\w+", str(message.get("content", ""))) if message["role"] not in _COMMON else ()
            if words and max(words, key=len) not in text:
                raise UserError(
                    f"{where}: the model's chat template leaves out messages of role {message['role']}; remove them, or"
                    " give another template with --template=chat:FILE"
                )
        return text + self.turn.lead

    def answered(self, messages: Sequence[Message], answer: Message, where: str, tools: Any = None) -> tuple[str, str]:
        """A prompt, and what is trained on after it: the answer and the token that ends its turn.

        Args:
            messages: conversation before the answer.
            answer: message of the assistant.
            where: row, for messages.
            tools: descriptions of tools as the template takes them, or None.

        Raises:
            UserError: it cannot be told from the rendering where the answer begins or ends.
        """
        prompt, turn = self.prompt(messages, where, tools), self.turn
        if turn.problem:
            raise UserError(f"{where}: {turn.problem}")
        whole = self.render([*messages, answer], where, tools)
        content, more = str(answer.get("content") or ""), bool(_MORE & answer.keys())
        begins = prompt.removesuffix(turn.opening) if turn.opening else prompt
        if not whole.startswith(begins) or not whole.endswith(turn.tail):
            raise UserError(f"{where}: {_untold('begins or ends', whole)}")
        body = whole[len(begins) : len(whole) - len(turn.tail)]
        if more and not turn.opening:
            return prompt, body + turn.end
        said = content.strip()
        if not more and turn.opening and said.endswith(body.strip()):
            # Thoughts that the template takes out of a finished turn are trained on; the prompt has opened them.
            return prompt, _after(turn.opening, content) + turn.end
        if not more and body.rstrip().endswith(said):
            before = body[: body.rindex(said)]
            return prompt, (body[len(before) :] if before.strip() else body) + turn.end
        here, given = _squeezed(body), _squeezed(content)
        if not more and given.endswith(here) and _squeezed(prompt).endswith(given.removesuffix(here)):
            return prompt, body + turn.end  # other white space, or begun by the prompt
        raise UserError(f"{where}: {_untold('stands', whole)}")


_LARGEST = 2**20  # bytes of a template; the longest in use have some 20,000
_COMMON = ("user", "assistant")
_TRIED: set[str] = set()  # templates that came to an end
_PATIENCE = 9.0  # seconds


def _try(chat: Chat, messages: Sequence[Message], tools: Any, generation: bool, where: str) -> None:
    """Renders with a template for the first time, in a process that ends when it takes too much.

    Raises:
        UserError: it does.
    """
    if chat.template in _TRIED:
        return
    values = {"messages": list(messages), "tools": tools, "add_generation_prompt": generation}
    given = {"template": chat.template, "values": {**chat.tokenizer.special_tokens_map, **values}}
    try:
        code = subprocess.run(
            [sys.executable, "-I", trial.__file__],
            input=json.dumps(given, default=str).encode(),
            capture_output=True,
            timeout=_PATIENCE,
        ).returncode
    except subprocess.TimeoutExpired:
        code = 1
    if code:
        raise UserError(
            f"{where}{': ' if where else ''}the model's chat template takes more than {trial.SECONDS} s or"
            f" {trial.BYTES // 2**30} GiB to render; give another with --template=chat:FILE, or --template=none"
        )
    _TRIED.add(chat.template)


def chat_of(tokenizer: Any, template: str = "auto", *, tools: bool = False) -> Chat | None:
    """The chat template that ``--template`` means, or None for none.

    Args:
        tokenizer: from `jaxcrit.data.tokenizer.load_tokenizer`.
        template: ``none``, ``auto``, ``chat:NAME`` for one of several, ``chat:FILE`` for one's own, or another name
            for the tokenizer's.
        tools: whether rows describe tools; a template named ``tool_use`` is for these.

    Raises:
        UserError: the tokenizer has no chat template, none of this name, or several and none called default.
    """
    known = tokenizer.chat_template or {}
    known = known if isinstance(known, dict) else {"default": known}
    named = template.removeprefix("chat:") if template.startswith("chat:") else ""
    if named in known:
        return Chat(tokenizer, _dated(known[named]))
    if named:
        return Chat(tokenizer, _dated(_read(named, known)))
    if template == "none" or (template == "auto" and not known):
        return None
    if not known:
        raise UserError(
            f"--template={template}: this tokenizer has no chat template; use --template=none for the raw prompt, or"
            " chat:FILE for a template of your own"
        )
    name = "tool_use" if tools and "tool_use" in known else "default"
    if name not in known:
        raise UserError(
            f"--template={template}: this tokenizer has the chat templates {listed(sorted(known))}, and none called"
            f" default; choose one, such as --template=chat:{sorted(known)[0]}"
        )
    return Chat(tokenizer, _dated(known[name]))


def _read(named: str, known: dict[str, str]) -> str:
    try:
        return read_text(local_path(named, "template"), "a Jinja template", _LARGEST)
    except (FileNotFoundError, UserError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        names = f"has the chat templates {listed(sorted(known))}" if known else "has no chat template"
        raise UserError(
            f"--template=chat:{named}: {reason}, and the tokenizer {names}; expected the name of one or a Jinja file"
        ) from None


def _dated(template: str) -> str:
    """The template with its calls for today's date replaced."""
    call = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    return re.sub(call, lambda match: json.dumps(_DATE.strftime(match[2])), template)


def _turn(chat: Chat) -> Turn:
    asked, answer, further = (
        {"role": role, "content": text} for role, text in (("user", _ASKED), ("assistant", _ANSWER), ("user", _NEXT))
    )
    try:
        prompt = chat.render([asked], generation=True)
        last = chat.render([asked, answer])
        longer = chat.render([asked, answer, further])
    except UserError as error:
        return Turn(problem=f"where an answer ends cannot be told: {error}")
    if any(word not in text for word, text in ((_ANSWER, last), (_ANSWER, longer), (_NEXT, longer), (_ASKED, prompt))):
        return Turn(problem=_untold("begins or ends", longer))
    before, _, tail = last.rpartition(_ANSWER)
    before_too, _, between = longer.partition(_NEXT)[0].rpartition(_ANSWER)
    common = next(
        (n for n, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), min(len(prompt), len(before))
    )
    lead, opening = before[common:], prompt[common:]
    if _ASKED in opening or (_squeezed(lead) and _squeezed(opening) not in ("", _squeezed(lead))):
        return Turn(problem=_untold("begins", longer))
    # White space is the answer's own, and so is what only the last answer has: Qwen 3 puts empty thoughts before it.
    lead = lead if lead.strip() and before_too.endswith(lead) and not opening else ""
    end, token = _end(chat.tokenizer, tail, between, prompt.partition(_ASKED)[0])
    return Turn(lead, opening, end, tail, token, "" if token else _untold("ends", longer))


def _end(tokenizer: Any, tail: str, between: str, user: str) -> tuple[str, str]:
    """The text up to the token that ends an answer, and that token; empty where there is none.

    Args:
        tokenizer: tokenizer that knows which tokens are special.
        tail: text after an answer that ends the conversation.
        between: text from an answer to the next user message.
        user: text in front of the first user message.
    """
    added = [one for one in tokenizer.added_tokens_decoder.values() if one.content.strip()]
    eos = tokenizer.eos_token
    begins = user.removeprefix(tokenizer.bos_token or "").strip()
    for names in ([one.content for one in added if one.special], [one.content for one in added if not one.special]):
        names = sorted((name for name in names if name == eos or name != tokenizer.bos_token), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        closing, parting = pattern.search(tail), pattern.search(between)
        if closing and (closing[0] == eos or (parting and closing[0] == parting[0])):
            found, text = closing, tail
        elif parting and not closing:
            found, text = parting, between
        elif closing:
            return "", ""  # one more turn shows that it does not end an answer
        else:
            continue
        closed = found is closing and found.end() == len(tail.rstrip())
        if parting and found[0] != eos and not closed:
            # A turn that nothing ends is followed by what opens the next, with which a conversation begins too.
            opens = between[parting.start() :].strip()
            if begins == opens or (begins.endswith(opens) and len(pattern.findall(opens)) == 1):
                return "", ""
        return text[: found.end()], found[0]
    return "", ""


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _after(opening: str, content: str) -> str:
    """The answer without what the prompt holds already."""
    begun = content.lstrip().removeprefix(opening.strip())
    return content if begun == content.lstrip() else begun.lstrip("\n")


def _untold(what: str, rendering: str) -> str:
    shown = rendering if len(rendering) <= 300 else f"...{rendering[-300:]}"
    return (
        f"where an answer {what} cannot be told from the model's chat template, which renders {shown!r}; give"
        " --template=none, or a template that ends each turn with a special token (--template=chat:FILE)"
    )
