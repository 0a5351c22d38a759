"""`cython_lines.py CYTHON ARGUMENTS...`: cython --line-directives, and then no line of C without one counts to a line of Cython.

Cython writes `#line N "x.pyx"` in front of each line of C of a function's body, but not in front of what it adds itself (tables,
argument parsing, the module's start): the compiler would go on from the last directive, so these would be lines N + 1, N + 2 ... of
the .pyx.
"""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OTHER = '#line 1 "cython"'


def exact(text: str) -> str:
    """The C with a directive behind each line that has one in front, unless the next has its own."""
    lines = text.split("\n")
    out = []
    for at, line in enumerate(lines):
        out.append(line)
        ours = at > 0 and lines[at - 1].startswith("#line ") and not line.startswith("#line ")
        if ours and not any(following.startswith("#line ") for following in lines[at + 1 : at + 3]):
            out.append(OTHER)
    return "\n".join(out)


def main() -> int:
    argv = sys.argv[1:]
    status = subprocess.run(argv, check=False).returncode
    if status == 0 and "-o" in argv:
        made = Path(argv[argv.index("-o") + 1])
        made.write_text(exact(made.read_text()))
    return status


if __name__ == "__main__":
    sys.exit(main())
