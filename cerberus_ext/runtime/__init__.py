"""How a step runs: op by op, compiled, or recorded and replayed."""
