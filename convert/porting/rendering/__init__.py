"""A `Graph` with its module calls, written as the source of NNX modules."""
