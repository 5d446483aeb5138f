"""What the control plane answers over HTTPS, to those who have no certificate yet."""
