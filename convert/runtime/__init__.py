"""A module of either framework as we handle it: taken apart, cast, run, its calls seen."""
