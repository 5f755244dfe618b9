"""What loading and converting share: what a checkpoint says of itself, which model it is, what is
moved where, and the certificate of a conversion. A Plan needs a layout; a family only names it."""
