"""The families. Each folder is one; `zoo.registry` finds them by looking."""
