"""What the control plane does by itself, again and again. Each tick looks at the world anew."""
