"""Linear layers with quantized weights, and the call that puts them into a model."""
