"""Train a decoder-only transformer of about 10 million parameters on the documentation of Python's standard library.

    allstep run --nproc 2 examples/language_model.py
    allstep run --nproc 2 --mesh shard=2 examples/language_model.py
    allstep run --nproc 4 --mesh shard=2,tensor=2 examples/language_model.py
    ./launch/torchrun.sh examples/language_model.py --steps 2000
    sbatch launch/slurm.sbatch examples/language_model.py --checkpoints runs/language_model

The text is the documentation strings of the standard library's modules, about 0.9 MB, read from its sources. A token is
a byte. Strings are joined, a zero byte behind each, and cut into rows of one length, so that no token of a row is
wasted on padding. Attention crosses the zero bytes: strings that follow each other come from one module, so the one
before helps, and the causal kernel without a mask is the fastest on every device.

Over two processes of a CPU that does 1,000 tokens a second in each, the loss on held-out text is below 2.2 nats a byte,
a perplexity of 9, within three minutes. Letters at their own frequencies have 3.3.

With --checkpoints a run that was killed or preempted goes on where it was, on as many ranks as it then has. A step
takes the same rows on any number of ranks. Forward passes are in bf16 on CUDA and in fp32 on the CPU: most processors
have no instructions for bf16, and a step then takes many times as long.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import sysconfig
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import allstep
from allstep import Checkpoint, Engine, Evaluate, Events, GradientClipping, Mean, Metrics, Preemption, Schedule

END, PADDING = 0, 255  # bytes that UTF-8 text does not have: the first in no docstring, the last in no text at all


def docstrings(modules: str) -> list[str]:
    """Each documentation string of the standard library's modules once, in the order of their files."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob(modules)):
        if {"test", "tests", "site-packages", "dist-packages"} & set(path.parts):
            continue
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[(ast.get_docstring(node) or "").replace("\0", " ")] = None
    found.pop("", None)
    return list(found)


def packed(texts: list[str], length: int) -> torch.Tensor:
    """Rows (N, length + 1) of bytes: each row's last byte is the next one's first, so every byte is predicted once."""
    content = b"".join(text.encode() + bytes([END]) for text in texts)
    rows = math.ceil((len(content) - 1) / length)
    content += bytes([PADDING]) * (rows * length + 1 - len(content))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).unfold(0, length + 1, length).clone()


def tokens_in(batch: torch.Tensor) -> int:
    """Tokens that a batch of rows asks to predict."""
    return int((batch[:, 1:] != PADDING).sum())


class Block(nn.Module):
    """Causal attention, then a perceptron, each on what is normalised first and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.attention_norm, self.perceptron_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, width) to the same; `angles` is (tokens, width of a head / 2)."""
        rows, tokens, _ = x.shape
        # By head first, so that a rank of the mesh's `tensor` has whole heads, however many of them.
        both = self.query_key_value(self.attention_norm(x)).view(rows, tokens, -1, 3, self.head_width)
        query, key, value = both.permute(3, 0, 2, 1, 4)
        attended = F.scaled_dot_product_attention(rotated(query, angles), rotated(key, angles), value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(rows, tokens, -1))
        return x + self.contract(F.gelu(self.expand(self.perceptron_norm(x))))


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al. 2021, RoFormer, section 3.2.2): pairs of features turned by their token's angles."""
    one, other = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


class LanguageModel(nn.Module):
    """Bytes (rows, tokens) to scores of the byte behind each (rows, tokens, 256)."""

    def __init__(self, width: int = 384, layers: int = 6, heads: int = 6) -> None:
        super().__init__()
        self.half_head = width // heads // 2
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.score = nn.Linear(width, 256, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Scores of each next byte."""
        at = torch.arange(text.shape[1], device=text.device)
        slowing = 10_000 ** (-torch.arange(self.half_head, device=text.device) / self.half_head)
        angles = torch.outer(at, slowing)
        x = self.embed(text)
        for block in self.blocks:
            x = block(x, angles)
        return self.score(self.norm(x))

    def tensor_plan(self) -> dict[str, str]:
        """How layers are divided where the mesh has `tensor`: attention by heads, perceptrons by features."""
        styles = {"query_key_value": "colwise", "project": "rowwise", "expand": "colwise", "contract": "rowwise"}
        return {f"blocks.*.{name}": style for name, style in styles.items()}


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of the cross-entropy of the next one, in nats."""
    rows = rows.long()
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), ignore_index=PADDING)


@torch.no_grad()
def line(model: nn.Module, begin: str, device: torch.device, count: int = 48) -> str:
    """Have the model go on; called on all ranks, which hold a part of it each where the mesh has `shard`."""
    generator = torch.Generator().manual_seed(0)  # of its own, so that training draws what it would without
    text = list(begin.encode())
    for _ in range(count):
        scores = model(torch.tensor([text], device=device))[0, -1].float().cpu()
        text.append(int(torch.multinomial(F.softmax(scores / 0.8, dim=0), 1, generator=generator)))
    return re.split("[\0\n]", bytes(text).decode(errors="replace"))[0]


def main(world: allstep.World, options: argparse.Namespace) -> None:
    """Train, and evaluate on text that was held out."""
    if options.heads % (sharing := world.world_size // world.data_size):
        raise SystemExit(f"--heads is {options.heads}, which tensor={sharing} of the mesh does not divide")
    texts = docstrings(options.modules)
    held_out, trained_on = texts[::50][: options.held_out], [each for at, each in enumerate(texts) if at % 50]
    train_rows = packed(trained_on, options.length)
    with world.building():
        model = LanguageModel(options.width, options.layers, options.heads)
    precision = options.precision or ("bf16" if world.device.type == "cuda" else "no")
    model = world.wrap(model, units=Block, precision=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1)

    def train_step(engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        model.train()
        loss = loss_of(model, world.to_device(batch))
        (loss * engine.state.weight).backward()
        if engine.state.group_end:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate_step(engine: Engine, batch: torch.Tensor) -> torch.Tensor:
        model.eval()
        return loss_of(model, world.to_device(batch))

    # Tokens are counted and not rows, so that the last row's padding weighs nothing.
    trainer = Engine(train_step, accumulate=options.accumulate, samples_in=tokens_in)
    evaluator = Engine(evaluate_step, uneven="longest", samples_in=tokens_in)
    Metrics({"loss": (loss := Mean()), "perplexity": math.e**loss}).attach(evaluator)
    GradientClipping(optimizer, 1.0).attach(trainer)
    warm_up = max(1, options.steps // 20)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps - warm_up, eta_min=options.rate / 10)
    Schedule(cosine, warm_up=warm_up).attach(trainer)
    held_out_loader = world.loader(packed(held_out, options.length), global_batch_size=64)
    Evaluate(evaluator, held_out_loader, every=options.evaluate * options.accumulate).attach(trainer)

    @evaluator.on(Events.COMPLETED)
    def report(engine: Engine) -> None:
        written = line(world.unwrap(model), "Return ", world.device)
        took, metrics = time.perf_counter() - began, engine.state.metrics
        world.print(
            f"step {trainer.state.optimizer_steps}: loss {metrics['loss']:.4f}, perplexity "
            f"{metrics['perplexity']:.2f} a byte, {took:.0f} s: {written!r}"
        )

    if options.checkpoints is not None:
        Checkpoint(options.checkpoints, every=options.checkpoint_every).attach(trainer).resume()
        Preemption(hurries=[evaluator]).attach(trainer)
    loader = world.loader(train_rows, global_batch_size=options.batch // options.accumulate, shuffle=True)
    size = sum(each.numel() for each in model.parameters())
    world.print(f"{world.world_size} rank(s) on {world.device.type}, {size:,} parameters, {train_rows.numel():,} bytes")
    began = time.perf_counter()
    trainer.run(loader, max_iters=options.steps * options.accumulate)
    if options.save is not None:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)  # on all ranks, for a model in parts
        if world.is_main:
            torch.save(weights, options.save)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="rows of all ranks in an optimizer step")
    parser.add_argument("--accumulate", type=int, default=1, help="parts in which a step's rows are taken")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--evaluate", type=int, default=100, help="steps from one evaluation to the next")
    parser.add_argument("--held-out", type=int, default=200, help="docstrings to evaluate on")
    parser.add_argument("--checkpoints", type=Path, help="folder to save checkpoints to and to resume from")
    parser.add_argument("--checkpoint-every", default="1 minute", help="such as '50 iterations' or '10 minutes'")
    parser.add_argument("--save", type=Path, help="file to save the trained weights to")
    parser.add_argument("--precision", choices=["no", "bf16"], help="of forward passes")
    parser.add_argument("--modules", default="*.py", help="files of the standard library; '**/*.py' is twice the text")
    for name, default in (("width", 384), ("layers", 6), ("heads", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    with allstep.init(seed=1) as world:
        main(world, parse())
