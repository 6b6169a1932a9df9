"""Atoll's own part of the speed benchmark: what `atoll bench` runs, and the figures it is compared with.

The contest with hand-written code and other frameworks is `benchmarks/speed/` of the repository. It takes workloads and
networks from here, and writes its figures to `recorded.json`.
"""
