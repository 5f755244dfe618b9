"""Images with channels last: a graph whose arrays lie as Flax wants them, for a port's source."""
