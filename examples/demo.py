"""`make demo`: the whole chain on this machine, from raw text to a tuned model that answers, each stage a command line
that can be typed by hand. Everything lies under demo/. A second start reuses each stage whose command, tool and inputs
are as they were."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]

# The numbers of the demo: under 6 minutes on 2 cores.
MEGABYTES = 4
VOCAB = 4096
PRETRAIN_STEPS = 200
PRETRAIN_EVAL = 50
TUNE_STEPS = 100
TUNE_EVAL = 50
TEXT_PROMPTS = ("The function returns",)
CHAT_PROMPTS = ("What does os.path.join do?", "What does json.dumps do?")


class StageFailed(Exception):
    """A stage's command failed; the message is the one line that the user sees."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Commands, run in turn from the repository's root, that make files under demo/ from those of earlier stages."""

    name: str
    what: str
    """What happens, in the reader's words."""
    commands: tuple[tuple[str, ...], ...]
    """Words of each command; `python` stands for the Python that runs the demo."""
    makes: tuple[str, ...] = ()
    """Paths, relative to the root, that must exist afterwards; removed before the stage is run again."""
    after: tuple[str, ...] = ()
    """Names of the stages whose results this one reads."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment beyond the caller's."""
    result: Callable[[Path], str] | None = None
    """From the root, what came out in one line."""
    replay: bool = False
    """What the commands print is the result: a reused stage prints its log."""

    def typed(self) -> list[str]:
        """The commands as one would type them."""
        set_first = "".join(f"{key}={shlex.quote(value)} " for key, value in self.env.items())
        return [set_first + shlex.join(command) for command in self.commands]


def stages() -> list[Stage]:
    """The chain, in order."""
    texts = ("corpus", "heldout", "instructions", "heldout_instructions")
    held_back = ("--valid-data", "demo/data/heldout")
    return [
        Stage(name="data", what=f"{MEGABYTES} MB of text from this Python's own documentation",
              commands=(("python", "tools/make_demo_data.py", "--output", "demo/data", "--megabytes", str(MEGABYTES)),),
              makes=tuple(f"demo/data/{name}.jsonl" for name in texts)),
        Stage(name="tokenizer", what=f"a sentencepiece vocabulary of {VOCAB:,} pieces, trained on that text",
              commands=(("python", "tools/train_tokenizer.py", "--input", "demo/data/corpus.jsonl",
                         "--vocab-size", str(VOCAB), "--output", "demo/tokenizer"),),
              makes=("demo/tokenizer",), after=("data",)),
        preprocess("corpus", "training text to token ids (.bin/.idx)"),
        preprocess("heldout", "held-back text to token ids"),
        Stage(name="pretrain", what="a small Llama on 4 processes, TP2 x PP2, evaluated on the held-back text",
              commands=(("bash", "examples/pretrain_tiny.sh", "--tp", "2", "--pp", "2", "--device", "cpu",
                         "--data", "demo/data/corpus", *held_back, "--tokenizer", "demo/tokenizer",
                         "--steps", str(PRETRAIN_STEPS), "--eval-every", str(PRETRAIN_EVAL),
                         "--save-every", str(PRETRAIN_STEPS // 2), "--out", "demo/runs/pretrain"),),
              makes=("demo/runs/pretrain",), after=("tokenizer", "corpus", "heldout"), env={"NPROC": "4"},
              result=lambda root: losses(root / "demo/runs/pretrain/metrics.jsonl")),
        Stage(name="convert", what="the checkpoint as a Hugging Face folder; transformers must give equal logits",
              commands=(("python", "tools/convert_ckpt.py", "--load", "demo/runs/pretrain", "--save", "demo/hf",
                         "--to", "hf", "--verify"),),
              makes=("demo/hf",), after=("pretrain",), env={"HF_HUB_OFFLINE": "1"}),
        Stage(name="finetune", what="tuned on questions and answers, 2 processes",
              commands=(("bash", "examples/finetune_tiny.sh", "--device", "cpu", "--load", "demo/runs/pretrain",
                         "--data", "demo/data/instructions.jsonl",
                         "--valid-data", "demo/data/heldout_instructions.jsonl", "--steps", str(TUNE_STEPS),
                         "--eval-every", str(TUNE_EVAL), "--out", "demo/runs/tuned"),),
              makes=("demo/runs/tuned",), after=("data", "pretrain"), env={"NPROC": "2"},
              result=lambda root: losses(root / "demo/runs/tuned/metrics.jsonl")),
        Stage(name="samples", what="what the two models say; so small a model knows the form, not the facts",
              commands=(*(generate("pretrain", prompt) for prompt in TEXT_PROMPTS),
                        *(generate("tuned", prompt, "--chat") for prompt in CHAT_PROMPTS)),
              after=("pretrain", "finetune"), replay=True),
    ]


def preprocess(text: str, what: str) -> Stage:
    """The stage that turns demo/data/TEXT.jsonl into a dataset beside it."""
    prefix = f"demo/data/{text}"
    command = ("python", "tools/preprocess_data.py", "--input", f"{prefix}.jsonl", "--tokenizer", "demo/tokenizer",
               "--output-prefix", prefix)
    return Stage(name=text, what=what, commands=(command,), makes=(f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.json"),
                 after=("data", "tokenizer"))


def generate(run: str, prompt: str, *flags: str) -> tuple[str, ...]:
    """The command that continues `prompt` with the model of demo/runs/RUN."""
    return ("python", "-m", "engine.generate", "--load", f"demo/runs/{run}", "--prompt", prompt, *flags)


def losses(metrics: Path) -> str:
    """First and last training loss and the last held-back loss in a metrics.jsonl."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    seen = [row["loss"] for row in rows if "loss" in row]
    held_back = [row["valid_loss"] for row in rows if "valid_loss" in row]
    line = f"loss {seen[0]:.3f} -> {seen[-1]:.3f}"
    if held_back:
        line += f", on held-back text {held_back[-1]:.3f} (perplexity {math.exp(held_back[-1]):.1f})"
    return line


class Runner:
    """Runs stages in order, or finds that nothing about them changed. Logs and stamps lie beside the results."""

    def __init__(self, root: Path, chain: list[Stage]) -> None:
        self.root = root
        self.chain = chain
        self.logs = root / "demo" / "logs"
        self.stamps = root / "demo" / "stamps"

    def run(self) -> None:
        """Brings every stage up to date; raises StageFailed at the first that fails."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.stamps.mkdir(exist_ok=True)
        for number, stage in enumerate(self.chain, 1):
            head = f"[{number}/{len(self.chain)}] {stage.name}"
            print(f"{head}: {stage.what}", flush=True)
            done = self.reusable(stage)
            if done is None:
                seconds = self.make(stage)
                state = f"done in {seconds:.1f} s"
            else:
                state = f"reused (took {done['seconds']:.1f} s when it was made)"
                if stage.replay:
                    print(indented(self.log(stage).read_text()), flush=True)
            result = f": {stage.result(self.root)}" if stage.result else ""
            print(f"{head}: {state}{result}", flush=True)

    def log(self, stage: Stage) -> Path:
        """Where the output of the stage's commands is kept."""
        return self.logs / f"{stage.name}.log"

    def stamp(self, name: str) -> Path:
        """The file whose time says when the stage was last made, and whose content says how."""
        return self.stamps / f"{name}.json"

    def key(self, stage: Stage) -> str:
        """Changes with anything in the stage's command lines."""
        return hashlib.sha256("\n".join(stage.typed()).encode()).hexdigest()

    def reusable(self, stage: Stage) -> dict[str, Any] | None:
        """What the stamp says when the stage need not run: same commands, results there, nothing they read is newer."""
        stamp = self.stamp(stage.name)
        if not stamp.is_file() or not all((self.root / path).exists() for path in stage.makes):
            return None
        scripts = [self.root / word for command in stage.commands for word in command if word.endswith((".py", ".sh"))]
        made = stamp.stat().st_mtime_ns
        for path in (*scripts, *(self.stamp(name) for name in stage.after)):
            if not path.is_file() or path.stat().st_mtime_ns > made:
                return None
        content: dict[str, Any] = json.loads(stamp.read_text())
        return content if content["key"] == self.key(stage) else None

    def make(self, stage: Stage) -> float:
        """Runs the stage's commands from a clean state, shows and logs what they print; returns the seconds it took."""
        self.stamp(stage.name).unlink(missing_ok=True)
        for path in stage.makes:
            remove(self.root / path)
        start = time.monotonic()
        with self.log(stage).open("w") as log:
            for command, typed in zip(stage.commands, stage.typed(), strict=True):
                show(f"$ {typed}\n", log)
                code = self.execute(command, stage.env, log)
                if code:
                    raise StageFailed(f"stage {stage.name!r} failed with exit code {code}: {typed}; "
                                      f"its output is in {self.log(stage)}")
        absent = [path for path in stage.makes if not (self.root / path).exists()]
        if absent:
            raise StageFailed(f"stage {stage.name!r} made no {', '.join(absent)}: {' && '.join(stage.typed())}; "
                              f"its output is in {self.log(stage)}")
        seconds = time.monotonic() - start
        self.stamp(stage.name).write_text(json.dumps({"key": self.key(stage), "seconds": round(seconds, 3)}))
        return seconds

    def execute(self, command: tuple[str, ...], env: Mapping[str, str], log: TextIO) -> int:
        """Runs one command, shows and logs each line as it comes, returns the exit code. Leaves no child behind."""
        words = [sys.executable if word == "python" else word for word in command]
        child = subprocess.Popen(words, cwd=self.root, env=environment(env), stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        assert child.stdout is not None
        try:
            for line in child.stdout:
                show(line, log)
            return child.wait()
        except BaseException:  # an interrupt, a signal: torchrun needs a moment to end its workers
            child.terminate()
            try:
                child.wait(timeout=30)
            except subprocess.TimeoutExpired:
                child.kill()
            raise


def show(line: str, log: TextIO) -> None:
    """Prints a line of a stage and keeps it in the stage's log, at once."""
    print(indented(line), flush=True)
    log.write(line)
    log.flush()


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without what a launcher left in it; our Python for the recipes; unbuffered output."""
    left = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    started = ("OMPI_", "MV2_", "PMI_", "PMIX_", "SLURM_")  # a launcher's process, or an interactive step of srun
    kept = {key: value for key, value in os.environ.items() if key not in left and not key.startswith(started)}
    return kept | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"} | dict(extra)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def indented(text: str) -> str:
    """`text` set apart from the demo's own lines."""
    return "\n".join(f"    | {line}" for line in text.rstrip("\n").split("\n"))


WHERE = """
Everything lies under demo/:
    demo/data/          the texts (.jsonl) and their token ids (.bin/.idx)
    demo/tokenizer/     the vocabulary
    demo/runs/pretrain/ the pretraining run: config.yaml, metrics.jsonl, checkpoints/
    demo/hf/            the same model for transformers: AutoModelForCausalLM.from_pretrained("demo/hf")
    demo/runs/tuned/    the tuned run
    demo/logs/          what every stage printed
Ask it something: .venv/bin/python -m engine.generate --load demo/runs/tuned --chat --prompt "What does len do?"
Start over: rm -r demo && make demo"""


def main() -> int:
    """Runs the demo; returns its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the stage's child is ended too
    start = time.monotonic()
    try:
        Runner(ROOT, stages()).run()
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; `make demo` goes on from the last stage that was done", file=sys.stderr)
        return 130
    print(f"\nThe whole chain took {time.monotonic() - start:.0f} s.{WHERE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
