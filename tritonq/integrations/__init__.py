"""tritonq beside other libraries: evaluation with transformers, and the demo."""
