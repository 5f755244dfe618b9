"""Training of zoo models in either framework from one description of a task."""
