"""The control plane's view of the mesh: frozen objects, their rules, and what follows from all of them together."""
