"""Live modules: saved as a checkpoint, and filled from one."""
