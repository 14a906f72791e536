"""Trains the demo model by the clock on one GPU, scores it and writes the checkpoint.

``python -m flyray.cluster.demo.training.train --corpus corpus.xz --tokenizer FOLDER --out FOLDER --seconds 500``
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import export, score
from .architecture import Architecture
from .attention import packed_attention
from .feed import Order, TaskRows, TextRows
from .load import load
from .model import Model
from .optimizer import Optimizer
from .packing import LEARNED, read_corpus
from .vocabulary import EOS, PAD, Vocabulary

LOG_SECONDS = 10.0
LOAD_MEMORY = 0.02  # share of a step in the mean load


@dataclass(frozen=True)
class Plan:
    """A run: its length, its rates, and what changes at which share of the time."""

    seconds: float = 500.0
    tokens_a_step: int = 96 * 1024
    short: int = 1024
    long: int = 4096
    matrix_rate: float = 0.015
    other_rate: float = 0.004
    warm_steps: int = 100
    decay_from: float = 0.45
    last_rate: float = 0.02
    rounding_from: float = 0.35  # INT4 experts
    yarn_from: float = 0.80
    long_from: float = 0.80  # long rows
    prompts_until: float = 0.60  # prompts are learned a little until then
    prompt_weight: float = 0.1
    task_shares: tuple[tuple[float, float], ...] = ((0.03, 0.25), (0.4, 0.55), (0.8, 0.75), (1.01, 0.88))
    bias_rate: float = 1e-3
    workers: int = 12
    seed: int = 0
    save_every: float = 170.0
    scored: int = 100
    scored_tools: int = 200

    def task_share(self, done: float) -> float:
        """The share of task rows."""
        return next(share for until, share in self.task_shares if done < until)

    def rate(self, step: int, done: float) -> float:
        """The share of the learning rate: warm-up by steps, then constant, then linear."""
        decay = 1.0 if done < self.decay_from else (1 - done) / (1 - self.decay_from)
        return min(1.0, (step + 1) / self.warm_steps) * max(self.last_rate, decay)

    def length(self, done: float) -> int:
        """The rows' length."""
        return self.long if done >= self.long_from else self.short


PLANS = {
    "scratch": Plan(),
    # a second run on a first run's checkpoint: lower rates, INT4 and YaRN all the time, more tasks and more long rows
    "continue": Plan(
        matrix_rate=0.010,
        other_rate=0.0027,
        decay_from=0.30,
        rounding_from=0.0,
        yarn_from=0.0,
        long_from=0.65,
        prompts_until=0.5,
        prompt_weight=0.05,
        task_shares=((0.4, 0.65), (0.8, 0.75), (1.01, 0.90)),
        seed=1,
    ),
}


@dataclass(frozen=True)
class Step:
    """A batch: flat ids, targets and loss weights ``[n]``, and which targets are text or learned task words."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    is_text: Tensor
    is_answer: Tensor
    length: int


class Trainer:
    """One run."""

    def __init__(self, plan: Plan, corpus: Path, tokenizer: Path, out: Path, start: Path | None) -> None:
        self.plan, self.out, self.tokenizer = plan, out, tokenizer
        self.started = time.time()
        out.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(plan.seed)
        torch.set_float32_matmul_precision("high")
        self.vocabulary = Vocabulary(tokenizer)
        self.tasks = TaskRows(self.orders(), self.device)
        self.streams = read_corpus(corpus)
        self.text = TextRows(self.streams, self.device, plan.seed)
        self.model = (load(start).train() if start else Model(Architecture())).to(self.device)
        if self.device == "cuda":
            self.model.compile_parts()
        self.optimizer = Optimizer(self.model, plan.matrix_rate, plan.other_rate)
        routed = [block for block in self.model.blocks if not block.is_dense]
        self.biases = [block.bias for block in routed]
        self.loads = torch.zeros(len(routed), self.model.sizes.n_routed_experts, device=self.device)
        self.steps = self.tokens = 0
        self.curve: list[dict[str, float]] = []
        self.recent: list[Tensor] = []
        self.log_file = (out / "log.txt").open("a")

    def orders(self) -> list[Order]:
        """What the task workers do."""
        plan, folder = self.plan, tempfile.mkdtemp()
        switch = self.started + plan.seconds * plan.long_from - 12
        stop = self.started + plan.seconds - 5
        first = 1000 * (plan.seed + 1)
        seeds = range(first, first + plan.workers)
        return [Order(seed, str(self.tokenizer), folder, switch, stop, plan.short, plan.long) for seed in seeds]

    def say(self, *words: object) -> None:
        """Logs a line."""
        line = " ".join(map(str, words))
        print(line, flush=True)
        self.log_file.write(line + "\n")
        self.log_file.flush()

    def batch(self, done: float) -> Step:
        """The next rows, text first, then tasks."""
        plan, length = self.plan, self.plan.length(done)
        rows = plan.tokens_a_step // length
        tasks = round(rows * plan.task_share(done)) if self.tasks.ready(length) > rows else 0
        texts = rows - tasks
        block = torch.stack(self.text.take(texts, length) + self.tasks.take(tasks, length)).long()
        marked, ids = (block & LEARNED) > 0, block & (LEARNED - 1)
        targets, is_answer = ids[:, 1:], marked[:, 1:].clone()
        is_text = torch.zeros_like(is_answer)
        is_text[:texts] = True
        is_answer[:texts] = False
        is_prompt = ~is_text & ~is_answer & (targets != PAD) & (targets != EOS)
        low = plan.prompt_weight if done < plan.prompts_until else 0.0
        weights = is_text.float() + is_answer.float() + low * is_prompt.float()
        return Step(*(each.reshape(-1) for each in (ids[:, :-1], targets, weights, is_text, is_answer)), length=length)

    def learn(self, step: Step, done: float) -> None:
        """One step of all weights and of the experts' biases."""
        model = self.model
        model.rounding = done >= self.plan.rounding_from
        model.yarn = done >= self.plan.yarn_from
        positions = torch.arange(step.length, device=self.device).repeat(step.tokens.shape[0] // step.length)
        attention = packed_attention(step.tokens, step.length)
        total, losses, loads = model(step.tokens, positions, attention, step.targets, step.weights)
        (total / step.weights.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        self.optimizer.step(self.plan.rate(self.steps, done))
        model.zero_grad(set_to_none=True)
        self.balance(loads.float())
        self.recent.append(torch.stack([mean(losses, step.is_text), mean(losses, step.is_answer), norm.detach()]))
        self.steps += 1
        self.tokens += step.tokens.shape[0]

    @torch.no_grad()
    def balance(self, loads: Tensor) -> None:
        """Moves the biases of the gates towards even loads ``[layers, e]``."""
        self.loads.lerp_(loads / loads.mean(1, keepdim=True), LOAD_MEMORY)
        moves = self.plan.bias_rate * torch.sign(loads.mean(1, keepdim=True) - loads)
        # torch has no public name for the fused sum of two lists of tensors
        torch._foreach_add_(self.biases, list(moves))  # pyright: ignore[reportPrivateImportUsage]

    def log(self, done: float, since: float, tokens_before: int) -> None:
        """A line on the last steps."""
        text, task, norm = torch.stack(self.recent).mean(0).tolist()
        self.recent = []
        now = time.time()
        point = {
            "seconds": round(now - self.started, 1),
            "tokens": self.tokens,
            "text": round(text, 4),
            "tasks": round(task, 5),
        }
        self.curve.append(point)
        speed = (self.tokens - tokens_before) / (now - since) / 1e3
        made = {length: (len(rows), self.tasks.used[length]) for length, rows in self.tasks.rows.items()}
        progress = f"step {self.steps} {point['seconds']:.0f}s done {done:.2f} {self.tokens / 1e6:.0f}M {speed:.0f}k/s"
        losses = f"text {text:.3f} tasks {task:.4f} norm {norm:.2f}"
        load = f"load {self.loads.max().item():.2f}/{self.loads.min().item():.2f}"
        self.say(progress, losses, "rows", made, "epochs", self.text.epochs(), load)

    def run(self) -> None:
        """Trains until the time is over."""
        begin = time.time()
        limit = self.plan.seconds - (begin - self.started)
        logged = saved = begin
        tokens_before = 0
        while (done := (time.time() - begin) / limit) < 1:
            self.learn(self.batch(done), done)
            now = time.time()
            if now - logged > LOG_SECONDS:
                self.log(done, logged, tokens_before)
                logged, tokens_before = now, self.tokens
            if now - saved > self.plan.save_every and done < 0.9:
                self.save()
                saved = now
        self.model.rounding = self.model.yarn = True
        self.tasks.stop()
        self.save()
        self.say(f"trained {self.steps} steps, {self.tokens} tokens, {time.time() - begin:.1f} s")

    def save(self) -> None:
        """Writes the checkpoint as it is, with the tokenizer's files."""
        export.save(self.model, self.model.sizes, self.out)
        for name in ("tiktoken.model", "tokenizer_config.json"):
            shutil.copy(self.tokenizer / name, self.out / name)

    def report(self) -> None:
        """Scores the model and writes ``scores.json`` and ``run.json``."""
        plan, begin = self.plan, time.time()
        counts = plan.scored, plan.scored_tools
        scores, wrong = score.report(self.model, self.vocabulary, self.streams, counts, self.device)
        for name, row in scores["tasks"].items():
            self.say(f"{name:28s} {row['right']}/{row['total']}")
        self.say("text", scores["text"], "probes", scores["probes"]["right"], scores["probes"]["total"])
        run = {
            "gpu": torch.cuda.get_device_name() if self.device == "cuda" else "none",
            "torch": torch.__version__,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": round(begin - self.started, 1),
            "text_epochs": self.text.epochs(),
            "expert_load": {"highest": rounded_list(self.loads.amax(1)), "lowest": rounded_list(self.loads.amin(1))},
            "plan": asdict(plan),
        }
        score.write(self.out / "scores.json", run | scores)
        (self.out / "run.json").write_text(json.dumps({"curve": self.curve, "wrong": wrong}, ensure_ascii=False))
        self.say("scored in", round(time.time() - begin, 1), "s")


def mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values, 0 if there are none."""
    return (values.detach() * chosen).sum() / chosen.sum().clamp_min(1)


def rounded_list(values: Tensor) -> list[float]:
    """Numbers with three digits."""
    return [round(value, 3) for value in values.tolist()]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("corpus", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--plan", choices=PLANS, default="scratch")
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--seconds", type=float, default=Plan.seconds)
    parser.add_argument("--workers", type=int, default=Plan.workers)
    parser.add_argument("--scored", type=int, default=Plan.scored, help="examples of each family and split")
    return parser.parse_args()


def main() -> None:
    given = parse()
    plan = replace(PLANS[given.plan], seconds=given.seconds, workers=given.workers, scored=given.scored)
    trainer = Trainer(plan, given.corpus, given.tokenizer, given.out, given.start)
    trainer.run()
    trainer.report()


if __name__ == "__main__":
    main()
