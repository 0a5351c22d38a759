from __future__ import annotations

from agent.lab.cli import command

command(prog_name="narrows lab")
