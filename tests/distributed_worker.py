"""What one process of a test with torchrun does: `torchrun ... distributed_worker.py FOLDER CHECK...`.

Each check runs on all processes. Its result, or its error, is in FOLDER/CHECK.RANK.pt; after an error the process ends.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import torch


def main(folder: Path, names: list[str]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group()
    for name in names:
        module, _, check = name.partition(":")
        result = {"error": None, "value": None}
        try:
            result["value"] = getattr(importlib.import_module(module), check)(folder)
        except BaseException:
            result["error"] = traceback.format_exc()
            raise
        finally:
            torch.save(result, folder / f"{check}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
