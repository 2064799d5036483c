"""What quantizing each layer costs, and what its tensors look like."""
