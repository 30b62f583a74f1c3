"""How fast heads make a model: what `cerberus bench` measures and reports."""
