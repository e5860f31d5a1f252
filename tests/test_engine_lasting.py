"""The training engine over many steps, under Ctrl-C, stopped early, and on more threads than there are cores."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import accuracy
import pytest
import torch

from fastenc import AutoEncoder, Callback, Encoder, Trainer

# Takes 10,000 steps, and tells in a line of JSON what grew after the first 3,000; then 3,000 for tracemalloc, which
# itself takes memory.
LASTING = """
import gc, json, os, sys, torch, tracemalloc
from fastenc import AutoEncoder, Callback, Encoder, Trainer

class Listener(Callback):
    def on_train_batch_end(self, batch, logs):
        pass

torch.manual_seed(0)
x = torch.rand(640, 40)
trainer = Trainer(AutoEncoder(Encoder(40, (64, 32), dropout=0.1)), seed=0, clip_norm=1.0)
callbacks = [Listener()] if sys.argv[1] == "True" else []

def take(thousands):
    for _ in range(thousands):
        trainer.fit(x, epochs=50, callbacks=callbacks)
    gc.collect()

def resident():
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())  # shared: of files, which come in as they are used
    return (resident - shared) * os.sysconf("SC_PAGESIZE")

take(3)
told = {"objects": -len(gc.get_objects())}  # first, as the list of them takes memory too
told["resident"] = -resident()
take(10)
told["resident"] += resident()
told["objects"] += len(gc.get_objects())
tracemalloc.start()
take(1)
told["traced"] = -tracemalloc.get_traced_memory()[0]
take(3)
told["traced"] += tracemalloc.get_traced_memory()[0]
print(json.dumps({**told, "how": trainer.explain()}))
"""

# Says "fitting", waits for Ctrl-C, tells in a line of JSON what it left, and goes on; for each line on its stdin.
INTERRUPTED = """
import json, sys, torch
from fastenc import AutoEncoder, Callback, Encoder, Trainer

class Listener(Callback):
    def on_train_batch_end(self, batch, logs):
        pass

threads, listens = int(sys.argv[1]), sys.argv[2] == "True"
torch.set_num_threads(threads)
torch.manual_seed(0)
x = torch.rand(2000, 64)
model = AutoEncoder(Encoder(64, (32, 16), dropout=0.1))
asked = []

def rate(step):
    asked.append(step)
    return 1e-3 / (1 + 1e-9 * step)

trainer = Trainer(model, seed=0, lr=rate)
trainer.fit(x)
for line in sys.stdin:
    raised = False
    try:
        print("fitting", flush=True)
        trainer.fit(x, epochs=10**9, validation_split=0.2, callbacks=[Listener()] if listens else [])
    except KeyboardInterrupt:
        raised = True
    how = trainer.explain()
    taken = [int(state["step"]) for state in trainer.optimizer.state.values()]
    shapes = all(
        trainer.optimizer.state[p][key].shape == p.shape
        for p in model.parameters() for key in ("exp_avg", "exp_avg_sq")
    )
    asked.clear()
    trainer.fit(x, epochs=3)
    print(json.dumps({
        "raised": raised,
        "how": how,
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "taken": taken,
        "state": shapes and len(taken) == len(list(model.parameters())),
        "next rate": asked[0],
        "then": trainer.explain(),
        "loss": trainer.evaluate(x)["loss"],
    }), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked up in /proc")
@pytest.mark.parametrize("listens", [False, True], ids=["whole calls", "a call for each step"])
def test_10_000_steps_leak_nothing(listens):
    command = [sys.executable, "-c", LASTING, str(listens)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["how"].startswith("1,000 of 1,000 steps were taken whole, by the C++ engine")
    assert told["resident"] < 10_000 * 200  # bytes: a tensor takes more
    assert told["objects"] < 10  # of Python's, in all fits together
    assert told["traced"] < 3_000 * sys.getsizeof(0.5)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to whole groups of processes")
@pytest.mark.parametrize(("threads", "listens"), [(1, False), (1, True), (4, False)])
def test_ctrl_c_leaves_a_usable_model(threads, listens):
    command = [sys.executable, "-c", INTERRUPTED, str(threads), str(listens)]
    lags = [0]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        for delay in (0.0, 0.02, 0.07, 0.15, 0.4):
            print("go on", file=child.stdin, flush=True)
            assert child.stdout.readline() == "fitting\n"
            time.sleep(delay)
            child.send_signal(signal.SIGINT)
            told = json.loads(child.stdout.readline())
            assert told["raised"]
            assert told["finite"]
            assert told["state"]
            assert len({*told["taken"]}) == 1
            lags.append(told["taken"][0] - told["next rate"])
            assert "by the C++ engine" in told["then"]
            assert told["loss"] < 0.1  # 0.08 is the variance of the data
            if delay == 0.4:
                assert "by the C++ engine" in told["how"]
        child.stdin.close()
    assert child.returncode == 0
    # Trainer counts steps as the optimiser does, unless Ctrl-C comes right where it counts, as in an ordinary step.
    off = [abs(there - here) for here, there in pairwise(lags)]
    assert max(off) <= 1 if listens else sum(lag > 0 for lag in off) <= 1


@pytest.mark.parametrize("stop", ["batch", "epoch"])
def test_a_callback_stops_early(stop):
    class StopAfterAnEpoch(Callback):
        def on_epoch_end(self, epoch, logs):
            self.trainer.stop_training = epoch == 1

    class StopInAnEpoch(Callback):
        def on_train_batch_end(self, batch, logs):
            self.trainer.stop_training = batch == 6

    torch.manual_seed(1)
    trainer = Trainer(AutoEncoder(Encoder(20, (8,))), seed=0)
    callback = StopInAnEpoch() if stop == "batch" else StopAfterAnEpoch()
    history = trainer.fit(torch.rand(320, 20), epochs=5, callbacks=[callback])
    taken = 7 if stop == "batch" else 20
    how = ", one a call for callbacks inside the epoch" if stop == "batch" else ""
    assert trainer.explain() == f"{taken} of {taken} steps were taken whole, by the C++ engine{how}"
    assert len(history.epoch) == (1 if stop == "batch" else 2)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {taken}
    trainer.fit(torch.rand(320, 20))
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {taken + 10}


def test_more_threads_than_cores():
    torch.manual_seed(2)
    x = torch.rand(1000, 100)
    model, results = AutoEncoder(Encoder(100)), []
    for threads in (1, 3 * (os.cpu_count() or 1) + 2):
        twin = copy.deepcopy(model)
        with accuracy.threads(threads):
            trainer = Trainer(twin, seed=0)
            history = trainer.fit(x, epochs=5, batch_size=250).history
        assert "by the C++ engine" in trainer.explain()
        results.append([torch.tensor(history["loss"]), *twin.state_dict().values()])
    assert all(torch.equal(one, many) for one, many in zip(*results, strict=True))
