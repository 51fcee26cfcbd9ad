"""Rotary position embedding: half-split form as in Hugging Face checkpoints, five kinds of frequency scaling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcrit.core.errors import UserError, did_you_mean, listed
from jaxcrit.core.schema import Positive, Size, conform

_SHARED = {"rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
_NOT_NUMBERS = {"rope_type", "short_factor", "long_factor", "truncate", "mscale", "mscale_all_dim"}
_NEEDED = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies of one model, computed once on the host in float32 as transformers does.

    Attributes:
        kind: default, linear, llama3, yarn or longrope.
        frequencies: R/2 angular frequencies in radians per token.
        long_frequencies: those of sequences longer than ``boundary`` (longrope), else None.
        boundary: longest sequence, in tokens, that ``frequencies`` are for; None where there is no other set.
        scale: factor on cosine and sine (yarn, longrope).
        others: embeddings of layers that rotate otherwise; of as many dimensions, and without others.
    """

    kind: str
    frequencies: tuple[float, ...]
    long_frequencies: tuple[float, ...] | None = None
    boundary: int | None = None
    scale: float = 1.0
    others: tuple[Rope, ...] = ()

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        head_dim: int,
        max_length: int,
        longrope: Collection[str],
        where: str,
        theta: float = 10000.0,
    ) -> Rope:
        """Reads both the old keys (``rope_theta``, ``rope_scaling``) and ``rope_parameters`` of transformers 5.

        Args:
            config: content of the file.
            head_dim: width of one head.
            max_length: longest context, in tokens.
            longrope: other names of that kind.
            where: name of the file.
            theta: base where the file names none.

        Raises:
            UserError: an unknown kind or key, a missing one, or old and new keys that disagree.
        """
        given, kind = _parameters(config, longrope, where)
        theta = float(given.get("rope_theta") or theta)
        rotary = int(min(head_dim * float(given.get("partial_rotary_factor") or 1.0), 2.0**31))
        if rotary > head_dim:
            raise UserError(f"{where}: expected at most {head_dim} rotary dimensions, those of a head; got {rotary}")
        if rotary < 2 or rotary % 2:
            raise UserError(
                f"{where}: expected an even number of rotary dimensions, got {rotary} of head_dim {head_dim}"
            )
        original = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        original = int(original or max_length)
        try:
            with np.errstate(all="ignore"):
                made = cls._made(given, kind, theta, rotary, original, max_length, where)
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where}: the parameters of RoPE ({kind}) give no frequencies ({error})") from None
        if not np.isfinite((*made.frequencies, *(made.long_frequencies or ()), made.scale)).all():
            raise UserError(f"{where}: the parameters of RoPE ({kind}) give frequencies that are no finite numbers")
        return made

    @classmethod
    def _made(
        cls, given: Mapping[str, Any], kind: str, theta: float, rotary: int, original: int, max_length: int, where: str
    ) -> Rope:
        powers = np.power(np.float32(theta), np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary))
        plain = (np.float32(1.0) / powers).astype(np.float32)
        if kind == "linear":
            return cls(kind, _floats(plain / np.float32(given["factor"])))
        if kind == "llama3":
            return cls(kind, _floats(_llama3(plain, given, original)))
        if kind == "yarn":
            return cls(kind, _floats(_yarn(powers, given, original, theta)), scale=_yarn_scale(given))
        if kind == "longrope":
            short, long = (_factors(given, key, rotary // 2, where) for key in ("short_factor", "long_factor"))
            factor = float(given.get("factor") or max_length / original)
            scale = given.get("attention_factor")
            if scale is None:
                scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            one = np.float32(1.0)
            return cls(kind, _floats(one / (short * powers)), _floats(one / (long * powers)), original, float(scale))
        return cls(kind, _floats(plain))

    def still(self) -> Rope:
        """The embedding of a layer without positions: all angles are 0, so that rotating changes no bit."""
        return Rope("none", (0.0,) * len(self.frequencies))

    @property
    def rotary_dim(self) -> int:
        """How many dimensions R of each head are rotated; the rest pass through (partial rotary)."""
        return 2 * len(self.frequencies)

    def cos_sin(self, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of every rotation.

        Longrope picks its set of frequencies per sample by the sample's own length, never by the padded
        length of the batch: else the same prompt would give other numbers in another bucket.

        Args:
            positions: ``[B, T]`` int, position of each token in its sequence.
            lengths: ``[B]`` int, number of real tokens of each sequence.

        Returns:
            Two ``[B, T, R/2]`` float32 arrays; ``[B, K, T, R/2]`` with those of the K - 1 others behind.
        """
        if self.others:
            alone = (dataclasses.replace(self, others=()), *self.others)
            cos, sin = zip(*(rope.cos_sin(positions, lengths) for rope in alone), strict=True)
            return jnp.stack(cos, axis=1), jnp.stack(sin, axis=1)
        frequencies = jnp.asarray(self.frequencies, jnp.float32)[None, None, :]
        if self.long_frequencies is not None and self.boundary is not None:
            is_long = (lengths > self.boundary)[:, None, None]
            frequencies = jnp.where(is_long, jnp.asarray(self.long_frequencies, jnp.float32), frequencies)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first R dimensions of each head, pairing dimension i with i + R/2.

    Args:
        x: ``[B, T, H, head_dim]`` queries or keys.
        cos: ``[B, T, R/2]`` float32.
        sin: ``[B, T, R/2]`` float32.

    Returns:
        Array of x's shape and dtype.
    """
    half = cos.shape[-1]
    cos, sin = (part[:, :, None, :].astype(x.dtype) for part in (cos, sin))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _parameters(config: Mapping[str, Any], longrope: Collection[str], where: str) -> tuple[dict[str, Any], str]:
    old = config.get("rope_scaling") or {}
    new = config.get("rope_parameters") or {}
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        raise UserError(f"{where}: expected rope_scaling and rope_parameters to be objects")
    old, new = _one_spelling(old, longrope), _one_spelling(new, longrope)
    silent = {"rope_type": "default", **config}  # transformers reads rope_scaling alone where both are given
    for key in sorted(new) if old else ():
        if old.get(key, silent.get(key)) != new[key]:
            raise UserError(
                f"{where}: {key} is {old.get(key)!r} in rope_scaling and {new[key]!r} in rope_parameters; which holds?"
            )
    given = dict(old or new)
    for key in ("rope_theta", "partial_rotary_factor"):
        outside = config.get(key)
        if outside is not None and given.setdefault(key, outside) != outside:
            raise UserError(f"{where}: {key} is {outside} at the top and {given[key]} in rope_parameters; which holds?")
    kind = str(given.get("rope_type", "default"))
    if kind not in _KEYS:
        raise UserError(f"{where}: expected rope_type {listed(list(_KEYS))}, got {kind!r}{did_you_mean(kind, _KEYS)}")
    unknown = sorted(key for key in given if key not in _KEYS[kind] | _SHARED)
    if unknown:
        raise UserError(f"{where}: unknown RoPE keys {listed(unknown)} for rope_type {kind}; refused, not guessed")
    for key, value in given.items():
        if key == "original_max_position_embeddings":
            conform(value, Size, where, key=key)
        elif key not in _NOT_NUMBERS:
            conform(value, Positive, where, key=key)
    missing = sorted(_NEEDED.get(kind, set()) - given.keys())
    if missing:
        raise UserError(f"{where}: rope_type {kind} needs {listed(missing)}")
    return given, kind


def _one_spelling(parameters: Mapping[str, Any], longrope: Collection[str]) -> dict[str, Any]:
    """Parameters with the kind under ``rope_type`` alone, and without nulls, which say nothing."""
    given = {key: value for key, value in parameters.items() if value is not None and key != "type"}
    kind = parameters.get("rope_type") or parameters.get("type")
    if kind in longrope:  # early Phi-3 files have other names for it
        kind = "longrope"
    return given if kind is None else {**given, "rope_type": kind}


def _llama3(plain: np.ndarray, given: Mapping[str, Any], original: int) -> np.ndarray:
    """Slow rotations divided by the factor, fast ones kept, the band between interpolated (Llama 3.1)."""
    low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
    wavelength = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    slow = plain / np.float32(given["factor"])
    blended = (1 - smooth) * slow + smooth * plain
    scaled = np.where(wavelength > original / low, slow, plain)
    return np.where((wavelength >= original / high) & (wavelength <= original / low), blended, scaled)


def _yarn(powers: np.ndarray, given: Mapping[str, Any], original: int, theta: float) -> np.ndarray:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, a linear ramp between."""
    rotary = 2 * len(powers)

    def dimension(rotations: float) -> float:
        return rotary * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(float(given.get("beta_fast") or 32)), dimension(float(given.get("beta_slow") or 1))
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(len(powers), dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 / (np.float32(given["factor"]) * powers)) * ramp + (1 / powers) * (1 - ramp)


def _yarn_scale(given: Mapping[str, Any]) -> float:
    def magnitude(multiplier: float) -> float:
        factor = float(given["factor"])
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return magnitude(float(given["mscale"])) / magnitude(float(given["mscale_all_dim"]))
    return magnitude(1.0)


def _factors(given: Mapping[str, Any], key: str, count: int, where: str) -> np.ndarray:
    factors = given[key]
    if (
        not isinstance(factors, list)
        or len(factors) != count
        or not all(isinstance(factor, int | float) and 0 < factor < math.inf for factor in factors)
    ):
        shown = f"{len(factors)}: {listed(factors, 3)}" if isinstance(factors, list) else repr(factors)
        raise UserError(f"{where}: expected {key} to be a list of {count} positive numbers, got {shown}")
    return np.asarray(factors, np.float32)


def _floats(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f) for f in frequencies.astype(np.float32))
