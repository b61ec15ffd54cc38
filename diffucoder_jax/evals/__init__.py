"""What we measure, and the pictures of it."""
