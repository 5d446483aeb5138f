"""What holds the control plane's state: one seam, and what implements it."""
