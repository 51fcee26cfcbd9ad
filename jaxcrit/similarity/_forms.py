"""Which of the exact forms of a sweep to run: the cheapest whose memory there is.

| form | operations of a sweep | bytes beside the tables | gives |
| --- | --- | --- | --- |
| resident | 2 L N^2 D + 4 C N^2 | activations + 8 L N^2 | rows of Grams, and the Grams |
| tiled | L N^2 D + 4 C N^2 | activations + 12 L T^2 | rows of Grams |
| features | 2 P N D^2 | activations + 8 D^2 | sums |
| streamed | 2 P N D^2 | 8 P D^2 | sums |

P pairs of layers (L (L+1)/2, or those of the band), C = L^2 or L times the band's width, tiles of T samples. So all
pairs are cheaper by Grams up to N of about D (L+1), a band of 2 up to 6 D.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jaxcrit.core.errors import UserError
from jaxcrit.similarity._features import BLOCK, layer_pairs
from jaxcrit.similarity._grams import Kernel, check_band

FormName = Literal["resident", "tiled", "features", "streamed"]
FORMS: tuple[str, ...] = get_args(FormName)
# Up to here the resident form holds little more than the tiled one (30 Grams of 1,500 samples take 270 MB).
RESIDENT_SAMPLES = 1500
# Up to here whole Grams can be had, and any sweep has rows: errors cost seconds.
KEPT_SAMPLES = 4096


@dataclasses.dataclass(frozen=True)
class Form:
    """How a sweep is computed.

    Attributes:
        name: resident, tiled, features or streamed.
        band: distance of layers up to which pairs are computed; None for all.
        flops: floating-point operations of all its products.
        memory: bytes per device.
        why: the choice in a few words.
    """

    name: FormName
    band: int | None
    flops: float
    memory: float
    why: str

    @property
    def has_rows(self) -> bool:
        """Whether it gives rows of Grams, and thus errors by deletion of samples."""
        return self.name in ("resident", "tiled")

    def __str__(self) -> str:
        """Such as ``tiled, all pairs: 1.5e+12 operations, 0.4 GiB; cheapest that fits``."""
        pairs = "all pairs" if self.band is None else f"pairs up to {self.band} layers apart"
        errors = "" if self.has_rows else "; no rows of Grams, so no standard errors"
        return f"{self.name}, {pairs}: {self.flops:.1e} operations, {self.memory / 2**30:.2g} GiB; {self.why}{errors}"


def choose_form(
    num_samples: int,
    width: int,
    num_layers: int,
    *,
    band: int | None = None,
    kernel: Kernel = "linear",
    memory: float,
    devices: int = 1,
    stored: bool = False,
    grams: bool = False,
    asked: str = "auto",
) -> Form:
    """Chooses the form of a sweep by cost.

    Up to 4,096 samples a form with rows, which errors come from, if it fits: the resident one up to 1,500, or where
    whole Grams are wanted; then the tiled one, which is as fast and holds less. Above, the form of fewest operations
    that fits.

    Args:
        num_samples: N.
        width: D.
        num_layers: L.
        band: distance of layers up to which pairs are wanted; None for all.
        kernel: the RBF kernel has no features, so no form by them.
        memory: bytes per device.
        devices: that share what is not replicated.
        stored: whether the activations are kept anyway, which rules streaming out.
        grams: whether something takes whole Grams. The RBF kernel is resident too: in tiles it takes two passes, and
            its bandwidth is of sampled pairs.
        asked: ``auto``, or the form to take whatever it costs.

    Raises:
        UserError: no form fits, an unknown one is asked for, one that the kernel or ``stored`` rules out, or a band
            wider than the model.
    """
    check_band(band, num_layers)
    pairs = len(layer_pairs(num_layers, band)[0])
    contracted = num_layers * (num_layers if band is None else min(num_layers, 2 * band + 1))
    tile = min(BLOCK, num_samples)
    activations = 4.0 * num_layers * num_samples * width
    tables = 16.0 * num_samples * num_layers**2
    squares = float(num_samples) ** 2
    costs: dict[FormName, tuple[float, float]] = {
        "resident": (
            2 * num_layers * squares * width + 4 * contracted * squares,
            activations + (8 * num_layers * squares) / devices + tables,
        ),
        "tiled": (
            num_layers * squares * width + 4 * contracted * squares,
            activations / devices + 12 * num_layers * tile**2 + tables,
        ),
        "features": (2.0 * pairs * num_samples * width**2, activations + 8 * width**2 / devices),
        "streamed": (
            2.0 * pairs * num_samples * width**2,
            8.0 * pairs * width**2 / devices + 8.0 * num_layers * tile * width,
        ),
    }
    excluded: dict[FormName, str] = {}
    if kernel == "rbf":
        excluded |= dict.fromkeys(("features", "streamed"), "the rbf kernel has no feature space")
    if stored:
        excluded["streamed"] = "activations are to be saved"
    if asked != "auto":
        if asked not in FORMS:
            raise UserError(f"form={asked!r}: expected auto, {', '.join(FORMS)}")
        if asked in excluded:
            raise UserError(f"form={asked}: {excluded[asked]}; take another form, or leave that out")
        name: FormName = asked  # type: ignore[assignment]
        return Form(name, band, *costs[name], "asked for")
    fitting: list[FormName] = [name for name, cost in costs.items() if name not in excluded and cost[1] <= memory]
    if not fitting:
        least = min(cost[1] for name, cost in costs.items() if name not in excluded)
        raise UserError(
            f"{num_samples} samples of {num_layers} layers of width {width}: every form takes {least / 2**30:.1f} GiB"
            f" or more, {memory / 2**30:.1f} are there; give a --band, fewer prompts with --limit, or more devices"
        )
    most = KEPT_SAMPLES if grams or kernel == "rbf" else RESIDENT_SAMPLES
    if "resident" in fitting and num_samples <= most:
        return Form("resident", band, *costs["resident"], f"at most {most} samples")
    if "tiled" in fitting and num_samples <= KEPT_SAMPLES:
        return Form("tiled", band, *costs["tiled"], f"at most {KEPT_SAMPLES} samples")
    # Of equal cost, the streamed form holds no activations.
    best = min(reversed(fitting), key=lambda name: costs[name][0])
    return Form(best, band, *costs[best], "fewest operations of what fits")
