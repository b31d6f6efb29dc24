"""What is computed: every operation declared in TensorIR, every float32 step named."""
