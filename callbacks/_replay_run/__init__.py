"""What ``replay`` looks at in a fit, and how two fits are compared."""
