"""A model in a format that others run: its graph and its weights, run and compared."""
