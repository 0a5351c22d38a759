"""The DNS proxy of captured pods. See ARCHITECTURE.md, DNS."""
