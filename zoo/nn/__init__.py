"""Building blocks that the frameworks define differently, or that one of them lacks, in pairs.

`NAME_torch` and `NAME_flax` hold the same names with the same arguments; neither imports the other.
What torch has itself, such as its pools, is in `NAME_flax` alone.
"""
