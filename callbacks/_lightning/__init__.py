"""What is asked of Lightning's objects that has no public name: the one folder for it."""
