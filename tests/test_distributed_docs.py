"""docs/distributed.md: its programs run under two torchruns that meet at an endpoint, as those of two machines do."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.DOTALL)


def test_the_programs_run(tmp_path):
    joined = "import torch.distributed\ntorch.distributed.init_process_group = lambda: None\n"  # by the first program
    (tmp_path / "both.py").write_text(f"import train\n{joined}import shard\n")
    for block in BLOCKS:
        (tmp_path / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((600, 20), dtype=np.float32))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=run1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "both.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    machines = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipe) for _ in range(2)]
    told = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    for output in told:
        assert "step by step: 2 processes share every batch" in output
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 5
    assert (tmp_path / "run" / "epoch-0004" / "model.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "sharded").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
    ]
