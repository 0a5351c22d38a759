"""The composition root of the control plane: sources -> mesh -> catalog -> hub -> streams, and what an operator sees of it."""
