"""The mesh as the agent knows it: frozen values, parsed once at the door. Imports nothing of ours."""
