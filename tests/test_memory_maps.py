"""Trainer on memory maps: rows stay on disk, and what was opened read-only is never written to."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from fastenc import AutoEncoder, Encoder, Trainer

ROWS, FEATURES = 500_000, 256  # 512 MB, of a file that takes no room on disk: it is empty but for its last row

# Uses the rows in argv[1] in every way, where memory cannot grow by half of what they take.
LARGER_THAN_MEMORY = """
import resource, sys, numpy as np, torch
from fastenc import AutoEncoder, Encoder, Trainer

def data_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))

def use(x):
    assert trainer.fit(x, epochs=2, batch_size=256, validation_split=0.1).history["loss"][-1] < 0.1
    assert "by the C++ engine" in trainer.explain()
    assert trainer.fit(x, x, shuffle=False, batch_size=256)
    assert trainer.evaluate(x)["loss"] < 0.1
    assert trainer.encode(x).shape == (len(x), 4)

torch.set_num_threads(1)
x = np.load(sys.argv[1], mmap_mode=sys.argv[2])
trainer = Trainer(AutoEncoder(Encoder(x.shape[1], (4,))), seed=0)
use(x[:1000])
most = data_bytes() + x.nbytes // 2
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
use(x)
try:
    np.ones(x.shape, np.float32)
except MemoryError:
    print("there was no room for a copy")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked up in /proc")
@pytest.mark.parametrize("mode", ["r", "c"])
def test_rows_larger_than_memory(tmp_path, mode):
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, "w+", np.float32, (ROWS, FEATURES))[-1] = 1.0
    command = [sys.executable, "-W", "error", "-c", LARGER_THAN_MEMORY, str(path), mode]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "there was no room for a copy\n"


@pytest.mark.parametrize("kind", ["file", "array"])
def test_a_model_that_writes_to_its_input_leaves_read_only_rows_alone(tmp_path, kind):
    rows = np.linspace(-1.0, 1.0, 400, dtype=np.float32).reshape(100, 4)
    if kind == "file":
        np.save(tmp_path / "x.npy", rows)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
    else:
        x = rows.copy()
        x.setflags(write=False)
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), seed=0)
    trainer.fit(x, shuffle=False, epochs=2)
    trainer.fit(x, x[:], validation_split=0.2)
    trainer.evaluate(x)
    trainer.predict(x)
    assert np.array_equal(x, rows)


def test_a_map_trains_to_the_bits_of_its_copy(tmp_path):
    torch.manual_seed(1)
    np.save(tmp_path / "x.npy", torch.rand(300, 20).numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")[10:]
    results = []
    for x in (mapped, np.array(mapped)):
        torch.manual_seed(2)
        trainer = Trainer(AutoEncoder(Encoder(20, (8,))), seed=0)
        history = trainer.fit(x, epochs=3, validation_split=0.1).history
        results.append([*trainer.model.state_dict().values(), *map(torch.tensor, history.values())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
