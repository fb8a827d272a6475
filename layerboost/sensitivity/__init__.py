"""What each layer's attention is worth, and how sure that is."""
