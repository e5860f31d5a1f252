"""Starts the processes of a test with torchrun, and reads what they found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def torchrun(processes: int, folder: Path, *checks: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `checks`, each "module:function", one after the other on that many processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(HERE / "distributed_worker.py"), str(folder), *checks]
    paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
    )


def results(folder: Path, check: str, processes: int) -> list[Any]:
    """What the check gave on each process.

    Raises:
        AssertionError: it failed on one, or was not reached.
    """
    values = []
    for rank in range(processes):
        path = folder / f"{check}.{rank}.pt"
        assert path.exists(), f"{check} was not reached on process {rank}"
        result = torch.load(path, weights_only=False)
        assert result["error"] is None, f"process {rank}: {result['error']}"
        values.append(result["value"])
    return values
