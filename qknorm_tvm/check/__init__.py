"""References, inputs and cases, and verification bit for bit."""
