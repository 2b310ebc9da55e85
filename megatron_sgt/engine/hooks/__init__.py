"""What can be attached to the training loop; ``base.Hook`` is the protocol."""
