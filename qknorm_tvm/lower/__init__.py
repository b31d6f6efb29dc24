"""From scheduled TensorIR to what the code generators take: what primitives cannot say."""
