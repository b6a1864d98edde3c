"""Train the mini model: `python train.py OUT --minutes 75` (resumes from OUT/checkpoint.pt when it is there; with
`--start engine/mini --from 0.5` a new run begins from the shipped weights, half-way through the schedule, so that 100
minutes take 50). Stop it with SIGTERM at any time: it saves and ends.

The schedule is a share of the time budget: warm-up, a long plateau, a linear decay over the last 35 %; dense look-ups first,
then whole runs; quantisation-aware for the last 25 %. Every few minutes it prints, on held-out worlds and for each
family, the share of episodes whose every token would have been written right (teacher-forced): the figure that decides.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from circuits import planted
from export import restored_state
from generate import pack_held_out, pack_mix, sample_texts
from network import Network, Shape
from optimiser import build, set_rate
from thinkloop.engine.tokenizer import Tokenizer
from torch import Tensor
from vocab import build_ranks, write_vocabulary

QUANTISE_FROM = 0.75
DECAY_FROM = 0.65
BATCH_TOKENS = 8192
SECOND_RUN = 10_000


@dataclass(slots=True)
class Batch:
    """`ids [B, T]` padded with 0; flat positions whose next token is to be learnt, and those tokens."""

    ids: Tensor
    pick: Tensor
    target: Tensor

    def to(self, device: str) -> Batch:
        return Batch(self.ids.to(device), self.pick.to(device), self.target.to(device))


def make_batch(episodes: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    width = max(len(ids) for ids, _ in episodes)
    ids = np.zeros((len(episodes), width), np.int64)
    learn = np.zeros((len(episodes), width), bool)
    for row, (tokens, mask) in enumerate(episodes):
        ids[row, : len(tokens)] = tokens
        learn[row, : len(tokens)] = mask
    flat = np.flatnonzero(learn)
    return Batch(torch.from_numpy(ids), torch.from_numpy(flat - 1), torch.from_numpy(ids.reshape(-1)[flat]))


def split(shard: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    ends = shard["ends"]
    return [(shard["ids"][a:b], shard["learn"][a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def batches(tokenizer: Tokenizer, first_world: int, share: float, rng: random.Random) -> Iterator[tuple[int, Batch]]:
    """Endless batches of similar lengths; `share` is the progress, read anew for each world through `batches.share`."""
    world = first_world
    while True:
        episodes = split(pack_mix(world, mix(progress.share, rng), tokenizer, bare=bare(progress.share)))
        rng.shuffle(episodes)
        episodes.sort(key=lambda episode: len(episode[0]) // 48)
        groups: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]
        for episode in episodes:
            if groups[-1] and (len(groups[-1]) + 1) * max(len(episode[0]), len(groups[-1][-1][0])) > batch_tokens(
                progress.share
            ):
                groups.append([])
            groups[-1].append(episode)
        rng.shuffle(groups)
        for group in groups:
            yield world, make_batch(group)
        world += 1


class progress:
    """The share of the time budget that is used."""

    share = 0.0


def batch_tokens(share: float) -> int:
    """Small batches first: circuits form by the number of steps, precision comes from averaging later."""
    return 4096 if share < 0.2 else BATCH_TOKENS


def bare(share: float) -> float:
    """Share of whole runs without the 235 tokens of a full prompt, which teach nothing new most of the time."""
    return 0.75 if share < 0.65 else 0.4


def mix(share: float, rng: random.Random) -> str:
    """Which mix the next world gives: drills, then dense look-ups, then whole runs."""
    drill, dense = (
        (0.7, 0.3) if share < 0.05 else (0.1, 0.5) if share < 0.2 else (0.03, 0.2) if share < 0.45 else (0.0, 0.0)
    )
    draw = rng.random()
    return "drill" if draw < drill else "dense" if draw < drill + dense else "full"


def rate(share: float, step: int) -> float:
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.02, (1 - share) / (1 - DECAY_FROM)))


@torch.inference_mode()
def exactness(
    network: Network, held_out: dict[str, list[tuple[np.ndarray, np.ndarray]]], device: str
) -> dict[str, list[float]]:
    """For each family the share of episodes with every learnt token right, and the share of learnt tokens right."""
    network.eval()
    result = {}
    for family, episodes in held_out.items():
        right = []
        for episode in episodes:
            batch = make_batch([episode]).to(device)
            with torch.autocast(device, torch.bfloat16):
                logits = network(batch.ids, batch.pick)
            right.append(logits.argmax(-1) == batch.target)
        result[family] = [
            round(sum(bool(r.all()) for r in right) / len(right), 3),
            round(torch.cat(right).float().mean().item(), 4),
        ]
    network.train()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--start", type=Path, help="published folder to begin from, such as engine/mini")
    parser.add_argument("--from", type=float, default=0.0, dest="share", help="share of the schedule to begin at")
    parser.add_argument("--rate", type=float, default=0.5, help="factor on the base learning rates")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "tiktoken.model").exists():
        prepare(arguments.out, arguments.start)
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(arguments.out)
    network = planted(Shape(tokenizer.n_vocab)).to(arguments.device)
    if arguments.start:
        network.load_state_dict(restored_state(arguments.start))
    optimisers = build(network)
    state = {"step": 0, "seconds": arguments.share * arguments.minutes * 60, "tokens": 0, "world": 0}
    if arguments.start:
        state["world"] = SECOND_RUN  # other worlds than those the weights have seen
    file = arguments.out / "checkpoint.pt"
    if file.exists():
        saved = torch.load(file, weights_only=True, map_location=arguments.device)
        network.load_state_dict(saved["network"])
        for optimiser, values in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        state = saved["state"]
    print(json.dumps({"parameters": sum(p.numel() for p in network.parameters()), **state}), flush=True)
    train(network, optimisers, state, tokenizer, arguments, file)


def prepare(out: Path, start: Path | None) -> None:
    """Give a new run its vocabulary: a new one, or that of the folder it starts from."""
    if start is None:
        write_vocabulary(out, build_ranks(sample_texts()))
        return
    for file in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(start / file, out / file)


def train(network, optimisers, state, tokenizer, arguments, file) -> None:  # type: ignore[no-untyped-def]
    held_out = pack_held_out(tokenizer)
    rng = random.Random(state["world"])
    started, before = time.monotonic(), state["seconds"]
    last_print = last_save = started
    losses: list[float] = []
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    tokens_then, time_then = state["tokens"], started
    budget = arguments.minutes * 60
    progress.share = before / budget
    for world, batch in batches(tokenizer, state["world"], progress.share, rng):
        now = time.monotonic()
        state |= {"seconds": before + now - started, "world": world + 1}
        progress.share = state["seconds"] / budget
        if progress.share >= 1 or stopped:
            break
        for moe in network.moes():
            moe.quantise = progress.share > QUANTISE_FROM
        set_rate(optimisers, arguments.rate * rate(progress.share, state["step"]))
        batch = batch.to(arguments.device)
        with torch.autocast(arguments.device, torch.bfloat16):
            logits = network(batch.ids, batch.pick)
        loss = F.cross_entropy(logits.float(), batch.target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        for moe in network.moes():
            moe.balance(0.015 * max(0.0, 1 - progress.share / 0.9))
        losses.append(loss.item())
        state["step"] += 1
        state["tokens"] += batch.ids.numel()
        if now - last_print > 150:
            speed = (state["tokens"] - tokens_then) / (now - time_then)
            tokens_then, time_then, last_print = state["tokens"], now, now
            mean = sum(losses) / len(losses)
            losses.clear()
            line = {
                "min": round(state["seconds"] / 60, 1),
                "step": state["step"],
                "Mtok": round(state["tokens"] / 1e6, 2),
            }
            line |= {
                "tok/s": round(speed),
                "loss": round(mean, 4),
                "exact": exactness(network, held_out, arguments.device),
            }
            print(json.dumps(line), flush=True)
        if now - last_save > 240:
            last_save = now
            save(network, optimisers, state, file)
    save(network, optimisers, state, file)
    print(
        json.dumps({"done": not stopped, "exact": exactness(network, held_out, arguments.device), **state}), flush=True
    )


def save(network, optimisers, state, file: Path) -> None:  # type: ignore[no-untyped-def]
    saved = {"network": network.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "state": dict(state)}
    temporary = file.with_suffix(".tmp")
    torch.save(saved, temporary)
    temporary.replace(file)


if __name__ == "__main__":
    main()
