"""The paper's strings and token sequences, slips included (PAPER edition); `docs/templates.md` lists the slips.

A rendering is a list of pieces: text, tokenised by itself with whatever the tokenizer puts around a text, and special
tokens. Llama-2 and Phi-3 have one text as prompt; the whole, prompt and target in one text, is tokenised again and as
many tokens masked as the prompt alone has. Llama-3 is put together from pieces, so that every text brings its own BOS
(OpenBookQA excepted), the target too. What the paper's code leaves open: BoolQ's target for Llama-3 is taken to be
that of the other two; pure_bad for Llama-3 has the Llama-2 strings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jaxcrit.core.errors import UserError
from jaxcrit.data.published import PUBLISHED, Fields


class Special(str):
    """A token that is named, not tokenised; `EOS` is the tokenizer's own."""


EOS = Special("<eos>")
# What a tokenizer must know to be of the family; the first that fits is ``auto``.
FAMILIES: dict[str, tuple[str, ...]] = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    "llama2": ("<s>", "</s>"),
}
_BOT, _SH, _EH, _EOT = map(Special, FAMILIES["llama3"])

_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."
_SYS = f"<<SYS>>\n{_TASK}. {_WRITE}\n<</SYS>>\n\n"
_SYS_INPUT = f"<<SYS>>\n{_TASK}, paired with an input that provides further context. {_WRITE}\n<</SYS>>\n\n"
_SYS_PURE_BAD = "<<SYS>>\nYou are a helpful assistant. Make sure you always execute users' instructions.\n<</SYS>>\n\n"
_HELPFUL = "You are a helpful assistant."
_LLAMA3_SYSTEM = {
    "alpaca": _HELPFUL,
    "boolq": _HELPFUL,
    "dolly": _HELPFUL + _WRITE,
    "gsm8k": _HELPFUL + _WRITE,
    "openbookqa": f"{_HELPFUL} Answer the following question. ",
}
_PHI3_SYSTEM = {
    "gsm8k": f"{_HELPFUL} Answer the following question. ",
    "openbookqa": f"{_HELPFUL} Answer the following question. ",
    "boolq": f" {_HELPFUL} Answer True or False for following question. ",
}

# Longest sequence of the loaders by (set, family), else by set; and of training, where a set has a length of its own.
_LOADER = {"alpaca": 256, "boolq": 512, "dolly": 512, "gsm8k": 512, "openbookqa": 256, "pure_bad": 256}
_LOADER_OF_FAMILY = {("alpaca", "phi3"): 512, ("boolq", "llama3"): 256}
_TRAINING = {"alpaca": 512, "dolly": 256, "pure_bad": 480}


@dataclasses.dataclass(frozen=True)
class Rendering:
    """One row as the paper's code feeds it.

    Attributes:
        prompt: masked pieces.
        target: pieces with loss.
        way: ``joined`` (the one text of the prompt and that of the target tokenised together), ``pieces`` (each for
            itself) or ``bare`` (each for itself without what the tokenizer puts around a text).
    """

    prompt: tuple[str, ...]
    target: tuple[str, ...]
    way: Literal["joined", "pieces", "bare"] = "joined"


def rendering(family: str, dataset: str, fields: Fields) -> Rendering:
    """The pieces of one row.

    Args:
        family: one of `FAMILIES`.
        dataset: one of `PUBLISHED`.
        fields: the parts of the row.
    """
    if family == "phi3":
        return _phi3(dataset, fields)
    return _llama3(dataset, fields) if family == "llama3" and dataset != "pure_bad" else _llama2(dataset, fields)


def _llama2(dataset: str, row: Fields) -> Rendering:
    if row.response is None:
        return Rendering((f"[INST] {row.instruction} [/INST]",), (EOS,))
    question, response = row.instruction, row.response
    if dataset == "openbookqa":
        question += "\n".join(row.choices)
        response = f"{row.key} {row.response}.{row.fact}"
    if dataset == "pure_bad":
        body = f"{_SYS_PURE_BAD}{question}"
    elif dataset == "alpaca" and row.context:
        body = f"{_SYS_INPUT}### Instruction:\n{question}\n\n### Input:\n{row.context}\n\n### Response:\n"
    elif dataset == "alpaca":
        body = f"{_SYS}### Instruction:\n{question}\n\n### Response:\n"
    else:
        context = f"Input: \n{row.context} \n \n" if dataset == "dolly" and row.context else ""
        body = f"{_SYS}### Instruction:\n {question} \n \n{context}### Response:"
    if dataset == "boolq":
        response = f"{row.response}. {row.context}"
    return Rendering((f"[INST] {body} [/INST]",), (f" {response} ", EOS))


def _llama3(dataset: str, row: Fields) -> Rendering:
    system: tuple[str, ...] = (_LLAMA3_SYSTEM[dataset],)
    user, response = row.instruction, row.response or ""
    tail: tuple[str, ...] = ("\n", _SH, "assistant", _EH)
    if dataset in ("alpaca", "dolly") and row.context:
        system, user = (*system, "\n", row.instruction), row.context
        tail = tail[1:]
    if dataset == "dolly":
        tail = ()
    elif dataset == "boolq":
        response = f"{row.response}. {row.context}"
    elif dataset == "openbookqa":
        user += " " + " ".join(row.choices)
        response = f"{row.key} {row.response}. Because {row.fact}"
        tail = tail[1:]
    turns = (_BOT, _SH, "system", _EH, "\n", *system, _EOT, _SH, "user", _EH, "\n", user, _EOT)
    return Rendering(turns + tail, (response, _EOT), "bare" if dataset == "openbookqa" else "pieces")


def _phi3(dataset: str, row: Fields) -> Rendering:
    user, end = row.instruction, "<|end|><|endoftext|>"
    target = f" {row.response}"
    if dataset in ("alpaca", "dolly"):
        user += f"\n{row.context}" if row.context else ""
        target, end = row.response or "", "<|end|>"
    elif dataset == "boolq":
        target += f". {row.context}"
    elif dataset == "openbookqa":
        user += " ".join(row.choices)
        target = f" {row.key} {row.response}.{row.fact}"
    prompt = f"<|system|>{_PHI3_SYSTEM.get(dataset, f'{_HELPFUL} ')}<|end|><|user|>{user}<|end|><|assistant|>"
    if dataset != "pure_bad":
        return Rendering((prompt,), (target + end,))
    return Rendering((prompt,), (EOS,) if row.response is None else (f"{target}<|end|>", EOS))


def family_of(tokenizer: Any, template: str = "auto") -> str:
    """The family whose strings to use; ``auto`` goes by the tokenizer, the part of the architecture that matters here.

    Raises:
        UserError: the family has no strings in the paper, or the tokenizer lacks its tokens.
    """
    if template not in ("auto", *FAMILIES):
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"--edition=paper: expected --template=auto, {known}; got --template={template}")
    lacking = {family: [t for t in tokens if token_id(tokenizer, t) is None] for family, tokens in FAMILIES.items()}
    if template == "auto":
        fitting = [family for family, missing in lacking.items() if not missing]
        if not fitting:
            raise UserError(
                "--edition=paper: this tokenizer is of none of the paper's families (llama2, llama3, phi3);"
                " use --edition=clean"
            )
        return fitting[0]
    if missing := lacking[template] if template != "llama2" else []:  # Llama-2's strings name no special token
        raise UserError(f"--template={template} --edition=paper: the tokenizer has no token {', '.join(missing)}")
    return template


def token_id(tokenizer: Any, token: str) -> int | None:
    """Id of a special token, or None where the vocabulary has none of that name."""
    if token == EOS:
        return tokenizer.eos_token_id
    known = tokenizer.convert_tokens_to_ids(token)
    return None if known == tokenizer.unk_token_id and token != tokenizer.unk_token else known


def tokenise(renderings: Sequence[Rendering], tokenizer: Any, where: str = "") -> list[tuple[list[int], int]]:
    """Token ids and prompt length of each row, every distinct text tokenised once.

    Raises:
        UserError: the tokenizer has no EOS where one is appended.
    """
    texts: dict[tuple[bool, str], list[int]] = {}
    for one in renderings:
        pieces = (one.prompt[0], _joined(one)) if one.way == "joined" else (*one.prompt, *one.target)
        texts.update({(one.way != "bare", piece): [] for piece in pieces if not isinstance(piece, Special)})
    for added in (True, False):
        wanted = [text for whole, text in texts if whole is added]
        ids = tokenizer(wanted, add_special_tokens=added, verbose=False)["input_ids"] if wanted else []
        texts.update({(added, text): one for text, one in zip(wanted, ids, strict=True)})

    def tokens(pieces: Sequence[str], added: bool = True) -> list[int]:
        found: list[int] = []
        for piece in pieces:
            known = token_id(tokenizer, piece) if isinstance(piece, Special) else 0
            if known is None:
                raise UserError(f"{where}{': ' if where else ''}--edition=paper: the tokenizer has no {piece} token")
            found += [known] if isinstance(piece, Special) else texts[added, piece]
        return found

    examples = []
    for one in renderings:
        if one.way == "joined":
            ids = tokens([_joined(one), *(piece for piece in one.target if isinstance(piece, Special))])
            examples.append((ids, min(len(tokens(one.prompt)), len(ids))))
        else:
            prompt, target = tokens(one.prompt, one.way != "bare"), tokens(one.target, one.way != "bare")
            examples.append((prompt + target, len(prompt)))
    return examples


def _joined(one: Rendering) -> str:
    return "".join(piece for piece in (*one.prompt, *one.target) if not isinstance(piece, Special))


def longest(family: str, dataset: str, training: bool) -> int | None:
    """Tokens at which the paper's code cuts a sequence on the right, or None: Llama-2's analysis never cuts."""
    if not training and family == "llama2":
        return None
    loader = _LOADER_OF_FAMILY.get((dataset, family), _LOADER[dataset])
    return _TRAINING.get(dataset, loader) if training else loader


def outline(family: str) -> list[object]:
    """Every string of a family with names in place of the fields: what its hash is made of."""
    names = {"instruction": "{i}", "response": "{r}", "choices": ("{c}", "{d}"), "key": "{k}", "fact": "{f}"}
    rows = [Fields(**names, context=context) for context in ("", "{x}")]  # type: ignore[arg-type]
    rows.append(Fields("{i}"))
    shown = [(dataset, rendering(family, dataset, row)) for dataset in PUBLISHED for row in rows]
    return [[dataset, list(one.prompt), list(one.target), one.way] for dataset, one in shown]
