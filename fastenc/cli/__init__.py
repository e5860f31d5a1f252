"""The command line: `fastenc train | finetune | encode | evaluate | explain-features | serve | tune | info | bench`.

The same as `python -m fastenc`.

Exit codes: 0 done; 2 bad input, with one sentence that names it and the cure; 130 Ctrl-C; 1 an error of fastenc's own,
or a machine that cannot do it.
"""

from __future__ import annotations

import sys

try:
    import typer  # noqa: F401
except ModuleNotFoundError:
    print('fastenc: the command line needs typer; run: pip install "fastenc[app]"', file=sys.stderr)
    raise SystemExit(2) from None

from . import encode, evaluate, explain_features, finetune, machine, serve, train
from .app import make_app

# In the order of the help.
COMMANDS = (
    train.train,
    finetune.finetune,
    encode.encode,
    evaluate.evaluate,
    explain_features.explain_features,
    serve.serve,
    machine.tune,
    machine.info,
)

app = make_app(COMMANDS)
machine.add_bench(app)


def main() -> None:
    app(prog_name="fastenc")
