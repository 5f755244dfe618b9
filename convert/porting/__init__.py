"""A torch module in the other framework: live, from its exported graph."""
