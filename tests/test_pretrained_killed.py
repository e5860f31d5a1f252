import os
import subprocess
import sys

from fastenc import Encoder

# Run in a fresh process, because it forks: children save over model 1 and are killed, at a chosen call or at any time.
KILLED = """
import os, signal, sys, time
from pathlib import Path
import torch
from fastenc import Encoder
from fastenc.loading import load_pretrained

def model(value):
    made = Encoder(256, (256, 64))
    for parameter in made.parameters():
        torch.nn.init.constant_(parameter, value)
    return made

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_half_way(self, *args):
    file = open(self, *args)
    class Half:
        def __enter__(self): return self
        def __exit__(self, *args): pass
        def write(self, content):
            file.write(content[: len(content) // 2]); file.flush(); die()
    return Half()

def killed_at(name):
    replace, calls = os.replace, []
    def replace_then_die(*args):
        replace(*args); die()
    def die_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2: die()
        replace(*args)
    if name == "before the file is opened": Path.open = die
    if name == "half way": Path.open = die_half_way
    if name == "before it is on the disk": os.fsync = die
    if name == "before the rename": os.replace = die
    if name == "after the rename": os.replace = replace_then_die
    if name == "before the copies": os.replace = die_at_the_second

def values(folder):
    found = load_pretrained(folder)
    return {value for parameter in found.parameters() for value in parameter.unique().tolist()}

def forked(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

folder = sys.argv[1]
expected = {"before the file is opened": 1.0, "half way": 1.0, "before it is on the disk": 1.0,
            "before the rename": 1.0, "after the rename": 2.0, "before the copies": 2.0}
first, second = model(1.0), model(2.0)
for name, value in expected.items():
    first.save_pretrained(folder)
    def work():
        killed_at(name)
        second.save_pretrained(folder)
    assert os.waitpid(forked(work), 0)[1] == signal.SIGKILL, name
    assert values(folder) == {value}, (name, values(folder))

def save_for_ever():
    while True:
        second.save_pretrained(folder)
        first.save_pretrained(folder)
for delay in range(20):
    child = forked(save_for_ever)
    time.sleep(0.005 + 0.0037 * delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert values(folder) in ({1.0}, {2.0}), (delay, values(folder))
print("survived")
"""


def test_a_save_killed_at_any_moment_leaves_one_whole_model(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.stdout == "survived\n", run.stderr
    leftovers = list(tmp_path.glob(".*.tmp"))
    assert leftovers  # a killed process cannot clean up
    for leftover in leftovers:
        os.utime(leftover, (0, 0))
    young = tmp_path / ".model.safetensors.young.tmp"
    young.touch()  # perhaps another process's, at work
    Encoder(3, (2,)).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [young.name, "config.json", "model.safetensors"]


# A writer, which saves model 1 with preprocessing 1, then 2 with 2, and so on; the parent reads all the while.
OVERWRITTEN = """
import os, signal, sys
import torch
from fastenc import Encoder, load_with_preprocessing

folder = sys.argv[1]

def save(value):
    made = Encoder(64, (64,))
    for parameter in made.parameters():
        torch.nn.init.constant_(parameter, value)
    made.save_pretrained(folder, preprocessing={"value": value})

save(0)
child = os.fork()
if child == 0:
    value = 1
    while True:
        save(value)
        value += 1
try:
    seen = set()
    while len(seen) < 20:
        model, preprocessing = load_with_preprocessing(folder)
        values = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
        assert values == {preprocessing["value"]}, (values, preprocessing)
        seen |= values
finally:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print("whole")
"""


def test_a_reader_never_sees_parts_of_two_saves(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", OVERWRITTEN, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert found.stdout == "whole\n", found.stderr
    assert found.returncode == 0
