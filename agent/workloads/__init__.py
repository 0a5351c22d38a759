"""The pods of this node: where they come from, and whether each is to be captured."""
