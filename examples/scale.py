"""Rows that memory has no room for, and one training shared by two processes.

    python examples/scale.py               # half a minute; the picture goes to out/scale
    python examples/scale.py --megabytes 4000 --processes 4

First: a file of rows is made, and the process forbids itself (RLIMIT_DATA) to take more memory than half of what they
are. A copy of the rows is then refused by the system; training and encoding go through them where they lie, as a memory
map. Second: the same training by torchrun, in one process and in two, which share every batch; in float64, so that what
differs is the order of the sums and nothing else. Linux only: the limit, and what is read in /proc, are its.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparing import Row, write_results

from fastenc import AutoEncoder, Callback, Encoder, Trainer, plots

FEATURES, FACTORS, BLOCK = 256, 8, 1 << 13
SHARED_ROWS, SHARED_EPOCHS = 4096, 4  # of the second part
MEGABYTE = 1 << 20


def memory(name: str) -> int:
    """Bytes, of the process: VmData may be written to, RssAnon of it is in memory; pages of files count in neither."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{name}:"))


def make_rows(path: Path, rows: int) -> None:
    """Rows [rows, FEATURES] of FACTORS hidden numbers each, and noise, written block by block."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((FACTORS, FEATURES), dtype=np.float32)
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, FEATURES))
    for start in range(0, rows, BLOCK):
        block = x[start : start + BLOCK]
        hidden = random.standard_normal((len(block), FACTORS), dtype=np.float32)
        block[:] = hidden @ mixing + random.standard_normal(block.shape, dtype=np.float32)
    x.flush()


class Peak(Callback):
    """The most memory that was in use at the end of an epoch, beside the steps' own."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.bytes = max(self.bytes, memory("RssAnon"))


def larger_than_memory(out: Path, megabytes: int) -> dict[str, float]:
    """Train and encode with less memory than the rows take."""
    path = out / "rows.npy"
    rows = megabytes * MEGABYTE // (4 * FEATURES)
    make_rows(path, rows)
    x = np.load(path, mmap_mode="r")
    torch.manual_seed(0)
    trainer = Trainer(AutoEncoder(Encoder(FEATURES, (FACTORS,), "identity")), lr=1e-3, seed=0)
    trainer.fit(x[:1000], verbose=False)  # what the libraries take for themselves, they have now
    trainer.encode(x[:1000])
    room = x.nbytes // 2
    before = memory("RssAnon")
    limit = memory("VmData") + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        np.ones(x.shape, np.float32)
        refused = False
    except MemoryError:
        refused = True
    peak = Peak()
    began = time.perf_counter()
    loss = trainer.fit(x, epochs=2, batch_size=256, callbacks=[peak], verbose=False).history["loss"][-1]
    seconds = time.perf_counter() - began
    least = 1.0 - FACTORS / FEATURES  # of the noise, what lies beside the hidden numbers
    codes = trainer.encode(x)
    peak.on_epoch_end(2, {})
    path.unlink()
    print(
        f"{rows:,} rows of {FEATURES} numbers: {x.nbytes / MEGABYTE:.0f} MB; "
        f"memory may grow by {room / MEGABYTE:.0f} MB"
    )
    print(f"a copy of the rows: {'refused by the system' if refused else 'there was room for it'}")
    print(f"2 passes in {seconds:.1f} s, loss {loss:.4f} (the least is {least:.4f}), by: {trainer.explain()}")
    grown = peak.bytes - before
    print(f"memory grew by {grown / MEGABYTE:.0f} MB, the codes' {codes.nbytes / MEGABYTE:.0f} MB among them")
    return {"data": x.nbytes / MEGABYTE, "room": room / MEGABYTE, "grown": grown / MEGABYTE}


def shared_training() -> dict[str, Any]:
    """The second part: one process, or each of several under torchrun, runs this as it is."""
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    x = torch.rand(SHARED_ROWS, 64, generator=random, dtype=torch.float64)
    torch.manual_seed(0)
    model = AutoEncoder(Encoder(64, (64, 16), dtype=torch.float64))
    trainer = Trainer(model, seed=0)
    losses = trainer.fit(x, epochs=SHARED_EPOCHS, batch_size=256, verbose=False).history["loss"]
    return {"losses": losses, "how": trainer.explain()}


def shared_by(processes: int, out: Path) -> dict[str, Any]:
    """The same under torchrun."""
    path = out / "losses.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, "--worker", str(path)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(done.stdout)
    found = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows larger than memory, and several processes.")
    parser.add_argument("--out", type=Path, default=Path("out") / "scale", help="folder for the picture (%(default)s)")
    parser.add_argument("--megabytes", type=int, default=600, help="of rows (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="that share the second training (%(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        found = shared_training()
        if int(os.environ["RANK"]) == 0:
            args.worker.write_text(json.dumps(found), encoding="utf-8")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    alone, together = shared_training(), shared_by(args.processes, args.out)
    difference = max(abs(a - b) / a for a, b in zip(alone["losses"], together["losses"], strict=True))
    for processes, found in ((1, alone), (args.processes, together)):
        losses = ", ".join(f"{loss:.12f}" for loss in found["losses"])
        print(f"{processes} process{'es' * (processes > 1)}: losses {losses}\n  {found['how']}")
    print(f"the losses differ by {difference:.1e} of themselves at the most\n")
    figures = larger_than_memory(args.out, args.megabytes)  # last: the limit stays
    plots.save_plot(lambda axes: draw(axes, figures), args.out / "memory.png", (9, 3))
    print(f"\nThe picture is {args.out / 'memory.png'}.")
    write_results(
        args.out,
        [
            Row("memory that training took, MB", figures["grown"], "the rows", figures["data"], higher=False),
            Row(
                f"loss of {args.processes} processes in float64",
                together["losses"][-1],
                "of one",
                alone["losses"][-1],
                higher=False,
            ),
        ],
    )


def draw(axes: Any, figures: dict[str, float]) -> None:
    bars = {"the rows, in a file": "data", "what memory was allowed to grow by": "room", "what it grew by": "grown"}
    for place, key in enumerate(bars.values()):
        axes.barh(place, figures[key], color=plots.ORANGE if key == "grown" else plots.BLUE, height=0.55, alpha=0.85)
        axes.text(figures[key], place, f"  {figures[key]:.0f} MB", va="center")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set(title="Training on rows larger than memory", xlabel="MB", xlim=(0, 1.15 * figures["data"]))


if __name__ == "__main__":
    main()
