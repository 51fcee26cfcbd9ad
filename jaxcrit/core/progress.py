"""Progress bars on stderr, for terminals only."""

from __future__ import annotations

import functools

from tqdm import tqdm

# disable=None: no bar where stderr is not a terminal.
bars = functools.partial(tqdm, disable=None, unit=" samples", leave=False)
