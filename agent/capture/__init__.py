"""Capture of a pod's connections: a plan as pure data, and what brings a pod's namespace to it and back."""
