"""What to look at before a port is trusted: read from names, shapes and the config, no tensor."""
