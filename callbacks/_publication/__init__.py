"""What is measured, saved and published: the machinery behind every average."""
