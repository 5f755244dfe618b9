"""Training states between PyTorch and optax, through one canonical form.

The form: `state` (what it is), `rule` and `rules` (the optimizers that are known, plugins too),
`storage` (as `optimizer.safetensors`), `summary`, `comparison`, `lazy` (arrays left in a file).
Found in a checkpoint: `besides` finds all of it, with `files_torch`, `files_flax`, `averages`,
`data`, and `ownership` where an optimizer does not name its parameters.
Live: `into_live` is `convert.load_optimizer`; `canonical_names` says which parameter is which.
torch: `torch_state`, both ways. optax: `optax_state` out of a tree, `optax_fill` into one, by what
stands where in it (`optax_tree`, `optax_leaves`).
Whether a transformation is torch's optimizer: `optax_trial` makes updates, `behaviour` holds them
against `reference_rules`, and `explanation` says why they differ.
"""
