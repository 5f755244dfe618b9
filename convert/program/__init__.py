"""What a torch module computes, as data: operations with their arguments, file and line.

`record` follows one call as it happens, `replay` runs the record again on other values. What the
user wrote stays visible (`masked_fill`, `theta ** x`); Python in between leaves only its results.
`export` has it from torch.export, for any sizes, as a `Graph` of ATen's operations.
"""
