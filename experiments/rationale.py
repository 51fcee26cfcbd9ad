"""Whether an answer gives its reasons before its conclusion, after it, or not at all: a rule, not a judgement.

The conclusion begins at the first of: ``the answer is`` (also final, correct, right, best; option or choice; a colon
for ``is``) and ``####``, both taken from the beginning of their sentence; or ``so``, ``therefore``, ``thus``,
``hence``, ``consequently`` at the beginning of a sentence or after a comma. Reasons are three words (or signs between
blanks) or more, in sentences: what comes before the conclusion, or whole sentences after it. So ``Sure! Based on the
text, the correct answer is B.`` is a conclusion alone.
"""

from __future__ import annotations

import re

BEFORE, AFTER, CONCLUSION, NONE, EMPTY = "before", "after", "conclusion", "none", "empty"
LEAST_WORDS = 3

_END = r"(?:(?<=[.!?;\n])|^)"
_ANSWER = r"\bthe\s+(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)(?:\s+is\b|:)"
_STATED = re.compile(rf"{_END}[^.!?;\n]*?(?:{_ANSWER}|####)", re.I)
_INFERRED = re.compile(rf"(?:{_END}|,)\s*(?:so|therefore|thus|hence|consequently)\b", re.I)


def rationale(answer: str) -> str:
    """Class of an answer.

    Returns:
        ``before``: reasons, then the conclusion; ``after``: the conclusion, then more sentences; ``conclusion``: it
        alone; ``none``: there is no conclusion; ``empty``.

    Example:
        >>> [rationale(text) for text in ("2 + 3 = 5. The answer is 5.", "The answer is 5.", "Mia likes red hats.")]
        ['before', 'conclusion', 'none']
    """
    if not answer.strip():
        return EMPTY
    found = [match for match in (_STATED.search(answer), _INFERRED.search(answer)) if match]
    if not found:
        return NONE
    first = min(found, key=lambda match: match.start())
    if len(answer[: first.start()].split()) >= LEAST_WORDS:
        return BEFORE
    rest = re.split(r"[.!?](?=\s)|\n", answer[first.end() :], maxsplit=1)
    return AFTER if len(rest) > 1 and len(rest[1].split()) >= LEAST_WORDS else CONCLUSION
