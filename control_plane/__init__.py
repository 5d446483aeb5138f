"""The server: who is there, who may do what, and who gets which task."""
