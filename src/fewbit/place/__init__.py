"""Which tensors get a quantizer, and of what kind."""
