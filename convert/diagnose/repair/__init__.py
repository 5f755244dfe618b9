"""Causes by search, where no rule knows one.

What is looked for is the smallest edit of torch's own computation that gives Flax's values.

`problem` records the computation and both sides' values; `worker` searches in a process of its own,
which may die of a candidate; `edits_*` say what is tried, `search` what counts as an explanation.
"""
