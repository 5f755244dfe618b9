"""The first place at which two modules part, and why: `find` and `hypotheses_tensors`."""
