"""How a step runs: op by op, fused into one native program, or recorded and replayed."""
