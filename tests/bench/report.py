"""Samples of a run as medians with their range, ratios against the targets, a table for people and JSON for programs."""
from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from tests.bench.cases import CASES, Case, Sample

ROOT = Path(__file__).resolve().parent.parent.parent
Samples = dict[str, list[Sample]]  # proxy -> rounds


def machine() -> dict[str, str]:
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True,
                            check=False).stdout.strip()
    return {"cpu": model, "kernel": platform.release(), "commit": commit or "no repository",
            "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def summarise(case: Case, samples: Samples) -> dict[str, Any]:
    """Medians, and for each target the ratio of medians with the range of the ratios of each round."""
    rows = {name: {"figure": spread([one.figure for one in rounds if one.figure is not None]),
                   "rate": spread([one.rate for one in rounds]),
                   **{key: spread([one.more[key] for one in rounds]) for key in rounds[0].more}}
            for name, rounds in samples.items() if rounds}
    return {"case": case.name, "title": case.title, "unit": case.unit, "rounds": max(map(len, samples.values())), "proxies": rows,
            "ratios": {peer: {"target": limit, **found} for peer, limit in case.targets.items() if (found := ratio(samples, peer))}}


def spread(values: list[float]) -> dict[str, float] | None:
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def ratio(samples: Samples, peer: str) -> dict[str, Any] | None:
    """Ours / theirs as the ratio of medians, the range of the rounds' ratios, and a 95 % bootstrap interval over rounds.

    Without a peer: our own figure.
    """
    def figures(name: str) -> list[float]:
        return [one.figure for one in samples.get(name, []) if one.figure is not None]

    ours = figures("narrows")
    if peer == "better":
        both = [name for name in ("haproxy", "nginx") if figures(name)]
        peer = min(both, key=lambda name: median(figures(name))) if both else peer
    theirs = figures(peer) if peer else [1.0] * len(ours)
    if not ours or not theirs:
        return None
    each = [a / b for a, b in zip(ours, theirs, strict=False)]
    dice = Random(1)
    rounds = range(len(each))  # drawn as pairs: what disturbs a round disturbs both
    picks = (dice.choices(rounds, k=len(each)) for _ in range(4000))
    drawn = sorted(median(ours[at] for at in pick) / median(theirs[at] for at in pick) for pick in picks)
    return {"peer": peer, "ratio": median(ours) / median(theirs), "min": min(each), "max": max(each),
            "low": drawn[100], "high": drawn[-101]}


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"


def table(summary: dict[str, Any]) -> str:
    """Markdown, readable as it is."""
    lines = [f"**{summary['title']}** ({summary['unit']}; {summary['rounds']} rounds)", "",
             "| proxy | median | min-max | units/s | more |", "|---|---|---|---|---|"]
    for name, row in summary["proxies"].items():
        figure, rate = row["figure"], number(row["rate"]["median"])
        more = ", ".join(f"{key} {number(value['median'])}" for key, value in row.items() if key not in ("figure", "rate") and value)
        middle, least, most = (number(figure[key]) if figure else "-" for key in ("median", "min", "max"))
        lines.append(f"| {name} | {middle} | {least} - {most} | {rate} | {more} |")
    for found in summary["ratios"].values():
        what = f"ours / {found['peer']}" if found["peer"] else "ours"
        lines.append(f"\n{what}: **{found['ratio']:.3f}** (rounds {found['min']:.3f} - {found['max']:.3f}, 95 % interval "
                     f"{found['low']:.3f} - {found['high']:.3f}), to reach {found['target']}: {verdict(found)}")
    return "\n".join(lines)


def save(path: Path, about: dict[str, Any], summaries: list[dict[str, Any]], samples: dict[str, Samples]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = {case: {name: [asdict(one) for one in rounds] for name, rounds in found.items()} for case, found in samples.items()}
    path.write_text(json.dumps({"about": about, "summaries": summaries, "samples": raw}, indent=1) + "\n")


# ---- the tables of README.md: python -m tests.bench.report RESULT.json ... ----------------------------------------------

def overview(files: list[Path]) -> str:
    """One table of all cases in these results, rounds of the same case joined: medians and what became of each target."""
    joined: dict[str, Samples] = {}
    commits: dict[str, str] = {}
    abouts = []
    for path in files:
        read = json.loads(path.read_text())
        abouts.append(read["about"])
        for case, samples in read["samples"].items():
            commits[case] = read["about"]["commit"]
            for name, rounds in samples.items():
                joined.setdefault(case, {}).setdefault(name, []).extend(Sample(**one) for one in rounds)
    found = {case: (summarise(CASES[case], samples), commits[case]) for case, samples in joined.items()}
    lines = [f"{abouts[-1]['cpu']}, 2 cores, kernel {abouts[-1]['kernel']}, {abouts[0]['when']} to {abouts[-1]['when']}", "",
             "| case | Envoy | HAProxy | nginx | Narrows | ours / peer (95 % interval), to reach |", "|---|---|---|---|---|---|"]
    for one, commit in found.values():
        cells = []
        for name in ("envoy", "haproxy", "nginx", "narrows"):
            row = one["proxies"].get(name)
            figure = row["figure"] if row else None
            cells.append(f"{number(figure['median'])} ({number(figure['min'])} - {number(figure['max'])})" if figure else "-")
        ratios = "; ".join(f"{ratio['peer'] or 'itself'} **{ratio['ratio']:.2f}** ({ratio['low']:.2f} - {ratio['high']:.2f}), "
                           f"{ratio['target']}: {verdict(ratio)}" for ratio in one["ratios"].values())
        lines.append(f"| {one['title']}: {one['unit']}, {one['rounds']} rounds, {commit[:7]} | {' | '.join(cells)} | {ratios or '-'} |")
    return "\n".join(lines)


def verdict(found: dict[str, Any]) -> str:
    if found["ratio"] <= found["target"]:
        return "reached"
    return "NOT reached" if found["low"] > found["target"] else "not reached, but within the interval"


if __name__ == "__main__":
    print(overview([Path(name) for name in sys.argv[1:]]))
