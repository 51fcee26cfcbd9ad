"""Auxiliary objectives of a training, as a user writes them; what they compute is in `jaxcrit.training.objectives`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import ClassVar, Literal

from jaxcrit.core.errors import UserError
from jaxcrit.core.groups import ObjectiveOptions


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """One objective beside the main loss: what a layer's state says by itself.

    Attributes:
        layer: 0-based layer whose state is supervised; nothing above it is trained by it.
        kind: ``exit`` is the cross entropy of a response under final norm and head, applied to that state and not
            trained by it; ``feature`` is one minus the cosine between the pooled state and that of a paired row.
        rows: name of the rows it looks at, among those rendered beside a training row (`Example.beside`); empty for the
            training rows themselves.
        weight: factor of its mean loss; 0 only measures it.
    """

    layer: int
    kind: Literal["exit", "feature"]
    rows: str
    weight: float

    @property
    def pools_response(self) -> bool:
        """Whether a ``feature`` compares the halves of two rows that are responses; else those that are prompts."""
        return "+" in self.rows

    def source(self, num_layers: int) -> int:
        """Layer of the paired row that a ``feature`` looks at: its own, or the last one where responses are compared.

        What a response in the known language looks like to the model is what its last layer makes of it.
        """
        return num_layers - 1 if self.pools_response else self.layer

    def __str__(self) -> str:
        return f"{self.layer}:{self.rows}" if self.rows else str(self.layer)


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """The objective beside the main loss that small changes of the embeddings matter little, in layers that train.

    Attributes:
        on: ``states`` is the relative change of the states after each layer that trains, summed over them; ``loss`` the
            cross entropy of the responses, which is plain adversarial training.
        size: length of the change of each token, in units of the norm of its embedding.
        steps: steps of the ascent that finds it.
        seed: seed of its random starts.
        weight: factor of its mean; 0 only measures it.
    """

    on: Literal["states", "loss"]
    size: float
    steps: int
    seed: int
    weight: float
    rows: ClassVar[str] = ""  # it looks at the training rows

    def __str__(self) -> str:
        return f"{self.on} at {self.size:g}"


@dataclasses.dataclass(frozen=True)
class Balance:
    """The balance loss of a mixture of experts, the mean over the micro-batches.

    Attributes:
        weight: factor of it.
    """

    weight: float
    rows: ClassVar[str] = ""

    def __str__(self) -> str:
        return "balance"


Objective = Auxiliary | Adversarial | Balance


def parse_supervise(text: str, weight: float, num_layers: int) -> tuple[Auxiliary, ...]:
    """Reads ``8,2:logits:FIELD,2:feature:FIELD,8:feature:FIELD+FIELD``.

    ``LAYER`` alone is an early exit on the training rows, ``LAYER:logits:FIELD`` one on rows with their prompt and, as
    response, the text in a field of the row. ``LAYER:feature:FIELD`` compares the training row's prompt with the prompt
    in that field, ``FIELD+FIELD`` its response with the response of a row of these two, a prompt and its response.

    Args:
        text: as above; empty for none.
        weight: weight of each.
        num_layers: L.

    Raises:
        UserError: not of that form, a layer outside the model, or the same objective twice.
    """
    found: list[Auxiliary] = []
    for part in text.split(",") if text else []:
        layer, _, rest = part.strip().partition(":")
        kind, _, fields = rest.partition(":")
        wanted = {"": 0, "logits": 1, "feature": 2}.get(kind)
        names = [name.strip() for name in fields.split("+")] if fields else []
        right = wanted is not None and (bool(names) == bool(kind)) and len(names) <= wanted and all(names)
        if not re.fullmatch("[0-9]{1,6}", layer) or not right:
            raise UserError(
                f"--supervise={text}: expected LAYER, LAYER:logits:FIELD, LAYER:feature:FIELD or"
                f" LAYER:feature:FIELD+FIELD with a row's fields, got {part.strip()!r}"
            )
        if int(layer) >= num_layers:
            raise UserError(f"--supervise={text}: expected layers 0 to {num_layers - 1}, got {layer}")
        rows = f"{kind}:{'+'.join(names)}" if kind else ""
        one = Auxiliary(int(layer), "feature" if kind == "feature" else "exit", rows, weight)
        if one in found:
            raise UserError(f"--supervise={text}: expected each objective once, got {part.strip()} twice")
        found.append(one)
    return tuple(found)


def objectives_of(options: ObjectiveOptions, num_layers: int, seed: int = 0) -> tuple[Objective, ...]:
    """The objectives beside the loss that options ask for; those of ``--supervise`` first.

    Args:
        options: what is asked.
        num_layers: L.
        seed: seed of what is drawn at random.

    Raises:
        UserError: see `parse_supervise`.
    """
    found = parse_supervise(options.supervise, options.supervise_weight, num_layers)
    if not options.adversarial:
        return found
    on: Literal["states", "loss"] = "states" if options.adversarial_on == "states" else "loss"
    size, steps, weight = options.adversarial, options.adversarial_steps, options.adversarial_weight
    return (*found, Adversarial(on, size, steps, seed, weight))


def names_of(auxiliaries: Collection[Objective]) -> list[str]:
    """Names of the rows that some objectives look at beside the training rows, each once."""
    return list(dict.fromkeys(one.rows for one in auxiliaries if one.rows))
