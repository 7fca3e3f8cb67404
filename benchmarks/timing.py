"""Times taken in turn in one process, as ratios, and peak memory of processes of their own."""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent
TOP_PAD, MMAP_MAX = -2, -4  # of mallopt, in glibc's malloc.h


def in_turn(actions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds that each action says it took in each round, after one round of warming up."""
    keep_pages()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            seconds = action()
            if number:
                times[name].append(seconds)
        print({name: round(values[-1], 2) for name, values in times.items() if values}, flush=True)
    return times


def timed(action: Callable) -> Callable[[], float]:
    """`action`, saying how many seconds it took."""

    def seconds() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return seconds


def keep_pages() -> None:
    """Makes glibc hold on to memory it got, as PyTorch's own allocator does on a graphics card.

    Without it each large tensor takes fresh pages from the system, a third of the time here and most of the noise.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TOP_PAD, 2**30)


def profiled(action: Callable, shown: int = 12) -> dict[str, float]:
    """Seconds that the costliest operators of `action` take by themselves, and all of them, after `in_turn`."""
    with torch.profiler.profile(acc_events=True) as profile:
        action()
    took = {event.key: (event.self_cpu_time_total + event.self_device_time_total) / 1e6
            for event in profile.key_averages()}
    costly = sorted(took, key=took.get, reverse=True)[:shown]
    return {name: round(took[name], 3) for name in costly} | {"all": round(sum(took.values()), 3)}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(over: list[float], under: list[float]) -> list[float]:
    """Median and quartiles of the ratios of each round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return [statistics.median(ratios), *statistics.quantiles(ratios, n=4)[::2]]


def peak_now() -> float:
    """Peak memory so far in GB: the card's if there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_alone(script: str, which: str, batch: int, size: int) -> float:
    """What `script --alone which` prints in a process of its own, in GB."""
    command = [sys.executable, HERE.parent / "dev.py", "run", script, "--alone", which,
               "--batch", str(batch), "--size", str(size)]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(said.strip().splitlines()[-1])


def conditions(batch: int, size: int, rounds: int) -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"batch": batch, "size": size, "rounds": rounds, "device": device}


def keep(result: dict, name: str) -> None:
    """Writes a result to `results/` and shows it."""
    text = json.dumps(result, indent=1)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(text + "\n")
    print(text)
