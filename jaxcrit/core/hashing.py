"""Identity of rows, templates, configs and tensors: sha256 of canonical bytes."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; NaN and infinities are refused, for they are not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex sha256 of UTF-8 text (lone surrogates kept, so that any JSON string has a hash)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a value."""
    return sha256_text(canonical_json(value))


def sample_id(row: dict[str, Any]) -> str:
    """Identity of one prompt: the hash of its raw row, whatever template later renders it."""
    return sha256_json(row)
