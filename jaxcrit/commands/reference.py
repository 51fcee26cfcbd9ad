"""The page of options in the docs, made of the declarations.

``python -m jaxcrit.commands.reference > docs/options.md`` writes it.
"""

from __future__ import annotations

import importlib

from jaxcrit.commands.main import COMMANDS, further
from jaxcrit.core.groups import ProcessOptions
from jaxcrit.core.options import Options, table

_HEAD = """# Options

Made by `python -m jaxcrit.commands.reference`; a test holds it to the code.

Each option is a flag of its command, a key of `--config=FILE.toml` (`steps = 100`; `[cluster_nmi]` above
`clusters = 50` for the options of a criterion), a line of a `--flagfile=FILE`, and an argument of the Python function
of the same name. What is given on the command line wins over the file. The last column says whether results depend on
the option: two runs that differ in one that they depend on are two runs, and never share a directory.
"""


def options_page() -> str:
    """The text of docs/options.md."""
    parts = [_HEAD]
    for name, (module, summary) in COMMANDS.items():
        own, *others = _options(module)
        parts.append(f"## jaxcrit {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n{table(own)}\n")
        parts += [f"Of {kind.title} alone:\n\n{table(kind)}\n" for kind in others]
    parts.append(f"## Every command\n\n{table(ProcessOptions)}\n")
    return "\n".join(parts)


def _options(name: str) -> list[type[Options]]:
    module = importlib.import_module(name)
    return [module.OPTIONS, *further(module)]


if __name__ == "__main__":
    print(options_page(), end="")
