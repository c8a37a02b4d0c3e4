"""What the README's figures come from: rustord beside what people would otherwise pick, in one run.

`python -m benchmarks` (root; see benchmarks/README.md) starts rustord, Redis and PostgreSQL one beside the other on
loop devices of the same kind, lets them take turns, and prints medians and ratios.
"""
