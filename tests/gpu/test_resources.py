"""What every kernel needs on every architecture, compiled ahead of time: no GPU takes part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
from fastenc.kernels.device import TARGETS

FOLDER = Path(__file__).parent
WHAT = ("kernel", "case", "dtype", "arch", "config")  # names a record
Record = dict[str, Any]


def compiled(*options: str) -> dict[str, Any]:
    """The report made now, in a process that takes over none of the settings that tests make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, str(FOLDER / "compile.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return compiled()


@pytest.fixture(scope="module")
def records(report: dict[str, Any]) -> list[Record]:
    return [record for record in report["records"] if record["arch"] in TARGETS]


def spills(record: Record) -> bool:
    return bool(record["stack"] or record["local_memory"])


def does_not_fit(record: Record) -> bool:
    return record["shared"] > TARGETS[record["arch"]].shared_memory


def multiplies_slowly(record: Record) -> bool:
    return bool(record["products"]) and record["dtype"] != "fp32" and not record["tensor_core"]


def multiplies_in_tf32(record: Record) -> bool:
    return record["dtype"] == "fp32" and bool(record["tensor_core"])


def multiplies_by_warp(record: Record) -> bool:
    """Whether it leaves sm_90's products of whole warp groups unused, where 64 rows and 4 warps allow them."""
    wide = any(int(product.split("x")[0]) >= 64 for product in record["products"])
    able = record["arch"] == 90 and record["dtype"] in ("bf16", "fp16") and record["config"]["num_warps"] >= 4
    return able and wide and "HGMMA" not in record["tensor_core"]


def waits_for_loads(record: Record) -> bool:
    """Whether a pipeline was asked for and none is there. Rows that are not aligned can be loaded in no other way."""
    pipelined = record["config"].get("num_stages", 1) > 1 and record["aligned"] and record["products"]
    return bool(pipelined) and not record["copies"]


def refills_what_is_read(record: Record) -> bool:
    """Whether several products are in one loop and one may go on while the next tile is copied in.

    Triton 3.8.0 then may copy into the memory that the product still reads. With one product in the loop, the pipeline
    has a buffer more.
    """
    return record["products_in_a_loop"] > 1 and record["unfinished"] > 0


FAULTS: Sequence[Callable[[Record], bool]] = (
    spills,
    does_not_fit,
    multiplies_slowly,
    multiplies_in_tf32,
    multiplies_by_warp,
    waits_for_loads,
    refills_what_is_read,
)


def found(records: list[Record], fault: Callable[[Record], bool]) -> list[str]:
    return [" ".join(str(record[key]) for key in WHAT) for record in records if fault(record)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_kernel(records, fault):
    assert found(records, fault) == []


def test_every_architecture_and_dtype_is_there(report):
    for arch in (*TARGETS, "gfx942"):
        dtypes = {record["dtype"] for record in report["records"] if record["arch"] == arch}
        assert dtypes >= {"bf16", "fp16", "fp32"}, arch


def test_every_kernel_is_there_for_every_architecture(report):
    names = {record["kernel"] for record in report["records"]}
    written = {
        line.removeprefix("def ").partition("(")[0]
        for path in (FOLDER.parents[1] / "kernels" / "triton").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.partition("(")[0].endswith("_kernel")
    }
    assert names == written


def test_no_larger_configuration_is_offered_than_fits():
    assert found(compiled("--candidates")["records"], does_not_fit) == []


def test_the_report_on_record_is_this_one(report):
    """Exactly, if the Triton on record is the one here; another compiler may need other numbers."""
    recorded = json.loads((FOLDER / "resources.json").read_text())
    if recorded["triton"] == report["triton"]:
        assert report["records"] == recorded["records"], "if that is right: make resources, and look at the difference"
    else:
        assert {record["kernel"] for record in report["records"]} == {r["kernel"] for r in recorded["records"]}


def test_planted_faults_are_found():
    planted = compiled("--cases", "planted")["records"]
    right = [record for record in planted if record["case"] == "nothing"]
    assert [found(right, fault) for fault in FAULTS] == [[]] * len(FAULTS)
    by_warp = [{**record, "tensor_core": {"HMMA": 32}} for record in right if record["arch"] == 90]
    assert found(by_warp, multiplies_by_warp)
    for fault in FAULTS:
        if fault is not multiplies_by_warp:
            assert found([record for record in planted if record["case"] == fault.__name__], fault), fault.__name__
