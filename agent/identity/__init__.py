"""Certificates of this node's identities: asked for, checked, renewed in time. Private keys stay with the keeper."""
