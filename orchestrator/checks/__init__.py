"""What is checked before anything starts; each fault names the field, the value and the remedy."""
