"""fastenc against eager PyTorch: one file per question, each run as `python -m benchmarks.<question>`.

`python -m benchmarks` asks them all. Run from the repository root, with fastenc installed in editable mode.
"""
