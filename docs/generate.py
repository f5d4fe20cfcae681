"""Writes the generated regions of the pages beside it: `make docs`, or `python docs/generate.py [--check]`.

A region stands between `<!-- generated: WHAT -->` and `<!-- end -->`; WHAT names one of MAKERS and its arguments. So
nothing that the code knows is written down twice; tests/docs/test_pages.py checks that no page lags behind.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.config import PRESETS, Layout, check, describe, parse, resolve_model  # noqa: E402
from engine.config.foreign import RUN  # noqa: E402
from engine.config.foreign_tools import TOOLS  # noqa: E402
from engine.errors import UserError  # noqa: E402
from engine.mesh import place  # noqa: E402
from engine.parallel.schedule import build_schedule  # noqa: E402
from engine.parallel.simulator import simulate  # noqa: E402
from engine.plan import parameters  # noqa: E402
from engine.plan.units import count_text  # noqa: E402

REGION = re.compile(r"(<!-- generated: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def options() -> str:
    """Every flag with its help and default."""
    return fenced(describe())


def presets() -> str:
    """The models that --model names."""
    rows = ["| `--model` | family | layers | hidden | ffn-hidden | heads | kv-heads | vocab-size | parameters |",
            "|---|---|---|---|---|---|---|---|---|"]
    for name in PRESETS:
        m = resolve_model({"model": name})
        rows.append(f"| `{name}` | {m.family} | {m.layers} | {m.hidden} | {m.ffn_hidden} | {m.heads} | {m.kv_heads} | "
                    f"{m.vocab_size} | {count_text(parameters(m))} |")
    return "\n".join(rows)


def gantt(name: str, stages: str, virtual: str, micros: str) -> str:
    """A schedule as the simulator draws it, a backward taking twice a forward's time."""
    return fenced(str(simulate(build_schedule(name, int(stages), int(virtual), int(micros)))))


def grid(pp: str, dp: str, tp: str) -> str:
    """Where each rank of a layout stands."""
    layout = Layout(pp=int(pp), dp=int(dp), tp=int(tp))
    return fenced("\n".join(
        f"rank {rank}: " + " ".join(f"{axis}{at}" for axis, at in place(layout, rank).items() if axis != "cp")
        for rank in range(layout.world)))


def source(path: str, first: str, last: str, language: str = "") -> str:
    """The lines of a file from one that starts with `first` to the next that starts with `last`."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    low = next(i for i, line in enumerate(lines) if line.startswith(first))
    high = next(i for i, line in enumerate(lines) if i >= low and line.startswith(last))
    return fenced("\n".join(lines[low : high + 1]), language or "text")


def error(world: str, *flags: str) -> str:
    """What a run with these flags is told."""
    try:
        check(parse(flags), int(world))
    except UserError as found:
        return fenced(f"error: {found}")
    raise SystemExit(f"{' '.join(flags)} on {world} processes is no error")


def training() -> str:
    """What benchmarks/train_step.py last committed: medians over its rounds."""
    content = results("train_step")
    head = f"{processor(content)}, bf16 by {content['machine']['bf16']}"
    rows = [f"| {head} | tokens/s | share of the matrix products' rate | x transformers |",
            "|---|---|---|---|"]
    shown = {name: r for name, r in content["results"].items() if not re.search("bound|pure|thread", name)}
    for name, result in shown.items():
        share, ratio = (f"{result[key]:{form}}" if result[key] else "-"
                        for key, form in (("share_of_bound", ".0%"), ("ratio_to_transformers", ".2f")))
        rows.append(f"| {name} | {result['tokens_per_s']:,.0f} | {share} | {ratio} |")
    return "\n".join(rows)


def results(name: str) -> Any:
    """What a benchmark last committed."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def processor(*contents: Any) -> str:
    """The processors that results were measured on: "2 cores of an Intel Xeon Processor"."""
    machines = {f"{content['machine']['cores']} cores of an {content['machine']['cpu']}" for content in contents}
    return re.sub(r"\((R|TM|tm)\)", "", " and ".join(sorted(machines)))


def preparation() -> str:
    """What benchmarks/preprocess.py, encoders.py and dedup.py last committed: megabytes a CPU second."""
    tools, encoders, dedup = map(results, ("preprocess", "encoders", "dedup"))
    head = f"megabytes of text a CPU second, {processor(tools, encoders, dedup)}"
    rows = [f"| {head} | Triax | beside |", "|---|---|---|"]
    for language in ("english", "chinese"):
        one = tools[language]
        ours, theirs = (one["sides"][f"{side}, 1 worker"]["megabytes_per_cpu_second"]
                        for side in ("triax", "Megatron-LM's method"))
        rows.append(f"| JSONL to `.bin` and `.idx`, {language.title()}, {one['megabytes']:.0f} MB, from start to end | "
                    f"{ours:.1f} | Megatron-LM's method {theirs:.1f} |")
    one = tools["large"]
    two, alone = (one["sides"][f"triax, {workers}"]["megabytes_per_second"] for workers in ("2 workers", "1 worker"))
    rows.append(f"| JSONL to `.bin` and `.idx`, English, {one['megabytes']:.0f} MB, a second of two workers | "
                f"{two:.1f} | one worker {alone:.1f} |")
    for language in ("english", "chinese"):
        for vocabulary, one in encoders[language].items():
            rates = {side: f"{rate:.1f}" for side, rate in one["megabytes_per_cpu_second"].items()}
            peers = ", ".join(f"{side} {rate}" for side, rate in rates.items() if side != "triax")
            rows.append(f"| encoding alone, {language.title()}, {vocabulary} | {rates['triax']} | {peers} |")
    rates = encoders["wikitext"]["megabytes_per_cpu_second"]
    rows.append(f"| wikitext to text | {rates['triax']:.1f} | mwparserfromhell {rates['mwparserfromhell']:.1f} |")
    for language in ("english", "chinese"):
        rates = {side: f"{one['megabytes_per_second']:.1f}" for side, one in dedup[language]["sides"].items()}
        peers = ", ".join(f"{side} {rate}" for side, rate in rates.items() if side != "triax")
        rows.append(f"| near-duplicates, {language.title()} | {rates['triax']} | {peers} |")
    return "\n".join(rows)


def figures() -> str:
    """What benchmarks/startup.py and benchmarks/checkpoint_io.py last committed."""
    startup, disk = map(results, ("startup", "checkpoint_io"))
    seconds = {name: result["median_seconds"]["total"] for name, result in startup["results"].items()}
    rows = [f"| from the command to the end of step 1, one process | {seconds['triax']:.1f} s | "
            f"transformers {seconds['transformers']:.1f} s |"]
    for ours, what, peer, peer_name in (
            ("triax save (fsync, crc32)", "saving a checkpoint, checksums and fsync included", "copy, fsync",
             "a file copy with fsync"),
            ("triax load (crc32)", "loading it, every checksum verified", "copy, no fsync", "a file copy")):
        result = disk["results"][ours]
        rows.append(f"| {what} | {result['gb_per_s']:.1f} GB/s | {result['shares'][peer]:.0%} of {peer_name} |")
    head = f"27.4 M parameters, fp32, {processor(startup, disk)}"
    return "\n".join([f"| {head} | Triax | beside |", "|---|---|---|", *rows])


def resources() -> str:
    """What benchmarks/resources.py --save last read from the machine code for sm_90; what is alike at several shapes is
    told once."""
    content = results("resources")
    rows = [f"| sm_90, Triton {content['triton']} | shape | dtype | warps | registers | shared memory | blocks an SM |",
            "|---|---|---|---|---|---|---|"]
    told = {tuple(use[key] for key in ("case", "kernel", "dtype", "warps", "registers", "shared")): use
            for use in reversed(content["kernels"]) if use["arch"] == 90}
    rows += [f"| {use['case']}: `{use['kernel']}` | {use['shape']} | {use['dtype']} | {use['warps']} | "
             f"{use['registers']} | {use['shared']:,} | {use['blocks']} |" for use in reversed(told.values())]
    return "\n".join(rows)


def foreign(source: str) -> str:
    """The words of another tool, and what they are called here."""
    table = RUN.get(source) or TOOLS[source]["others"]
    rows = [f"| `--{word}` | {f'`{flag}`' if flag else ''}{'; ' if flag and why else ''}{why} |"
            for word, (flag, why) in sorted(table.items())]
    return "\n".join(["| there | here |", "|---|---|", *rows])


MAKERS: Mapping[str, Callable[..., str]] = MappingProxyType(
    {"options": options, "presets": presets, "gantt": gantt, "grid": grid, "source": source, "error": error,
     "figures": figures, "training": training, "preparation": preparation, "resources": resources, "foreign": foreign})


def fenced(text: str, language: str = "text") -> str:
    """`text` as a block of code."""
    return f"```{language}\n{text}\n```"


def fill(page: str) -> str:
    """The page with its regions made anew."""
    def made(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match[2])
        return f"{match[1]}{MAKERS[name](*arguments)}\n{match[4]}"

    return REGION.sub(made, page)


def pages() -> list[Path]:
    """What may hold regions."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: list[str]) -> int:
    """Writes what has changed, or with --check only names it; 1 when --check finds a page that lags behind."""
    stale = [page for page in pages() if fill(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'lags behind: make docs' if '--check' in argv else 'written'}")
        if "--check" not in argv:
            page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
