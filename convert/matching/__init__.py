"""Which layer, and which tensor, of one side is which of the other."""
