"""What a text is worth."""
