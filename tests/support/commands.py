"""Runs ``jaxcrit`` commands one after the other in one process, which may be one of several."""

import json
import sys

from jaxcrit.commands.main import main

commands, machines = json.loads(sys.argv[1]), sys.argv[2:]
for command in commands:
    if code := main([*command, *machines]):
        print(f"{code} from jaxcrit {' '.join(command)}", file=sys.stderr, flush=True)
        sys.exit(code)
