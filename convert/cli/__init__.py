"""The commands, one module each. Only click is imported before one runs."""
