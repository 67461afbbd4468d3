"""What the user asks for, as one validated configuration."""
