"""Examples: what is on the machine, what is generated, and what a user brings."""
