"""Steps that bring a Net to canonical form before it is quantized."""
